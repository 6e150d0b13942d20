"""What reading and writing with a model needs on a slice: the real programs of generation and evaluation, compiled.

Three phases. *Prefill* reads a chunk of whole blocks of every stream. *Decode* writes one token of every stream; at the
border of a block it updates FAM and moves the block into the memory. *Measure* is prefill with the loss of every token,
by which held-out text is evaluated. The memory of a stream does not grow in any of them.
"""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import Config, MeshConfig, ModelConfig
from fam_jax.generate.compiled import compiled_calls, rows_sharding, state_sharding, structure
from fam_jax.generate.sampling import GREEDY
from fam_jax.generate.text import TOKENS_PER_CALL
from fam_jax.model import StreamState, create_model, lora, to_dict
from fam_jax.plan.chips import GIB, chip_of
from fam_jax.plan.compile import compile_or_miss, local_bytes, peak_bytes, topology_devices
from fam_jax.plan.cost import Estimate, estimate
from fam_jax.plan.hlo import Op, Shares, parse
from fam_jax.plan.layer_costs import kernels_of_types, shares_of_types
from fam_jax.restore import dtype_of_use
from fam_jax.sharding import make_mesh, param_shardings, replicated

SERVE = ("prefill", "decode")
MESHES = 4  # that are tried
LENGTHS = (100_000, 1_000_000)  # tokens of a stream, of which is told how long reading takes


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program on one mesh."""

    tokens: int  # of all streams, in a step
    peak: int  # bytes of a chip's HBM
    seconds: tuple[float, float] | None  # of a step, low and high; None: it does not fit
    compile_seconds: float
    details: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """For the JSON file."""
        found = {
            "tokens_per_step": self.tokens,
            "hbm_peak_bytes": self.peak,
            "compile_seconds": self.compile_seconds,
        }
        if self.seconds is None:
            return found
        low, high = self.seconds
        return found | {
            "step_seconds_low": low,
            "step_seconds_high": high,
            "tokens_per_second_low": self.tokens / high,
            "tokens_per_second_high": self.tokens / low,
            **self.details,
        }


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """Streams that are read and written on one mesh."""

    topology: str
    chips: int
    mesh: dict[str, int]
    streams: int
    chunk_blocks: int
    capacity: int  # bytes of a chip's HBM
    parameters: int  # bytes on a chip
    memory: int  # bytes of all streams' memory on a chip
    stream: int  # bytes of the memory of one stream, wherever it lies
    loading: int  # bytes of a chip's HBM while a checkpoint is restored
    phases: dict[str, Phase]

    @property
    def peak(self) -> int:
        """Bytes of a chip's HBM in the phase that needs most."""
        return max(phase.peak for phase in self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether all phases do, and loading."""
        return max(self.peak, self.loading) <= self.capacity

    def report(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            "streams": self.streams,
            "chunk_blocks": self.chunk_blocks,
            "fits": self.fits,
            "hbm_peak_bytes": self.peak,
            "hbm_capacity_bytes": self.capacity,
            "hbm_parameter_bytes": self.parameters,
            "hbm_memory_bytes": self.memory,
            "hbm_loading_bytes": self.loading,
            "bytes_per_stream": self.stream,
            "compile_seconds": sum(phase.compile_seconds for phase in self.phases.values()),
            "phases": {name: phase.report() for name, phase in self.phases.items()},
        }


def plan_serving(
    config: Config,
    topology: str,
    streams: int,
    phases: Sequence[str] = SERVE,
    *,
    mesh: MeshConfig | None = None,
    chunk_blocks: int | None = None,
) -> ServingPlan:
    """Compiles programs of :class:`fam_jax.generate.streaming.Streamer` for a slice and counts them.

    Args:
      config: of the run.
      topology: such as v5e:4x4.
      streams: that are read and written together.
      phases: some of prefill, decode and measure.
      mesh: in place of the config's.
      chunk_blocks: that go through the model at once; by default as many as in evaluation.

    Raises:
      UserError: the topology is unknown, or the TPU compiler not installed.
      ConfigError: the mesh does not fit the slice or the model.
    """
    devices = topology_devices(topology)
    chunk = chunk_blocks or config.evaluate.chunk_blocks
    programs = _Programs(config, make_mesh(mesh or config.mesh, devices), streams, chunk)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # The profile comes from processes of its own, beside this one's compilation.
        times = pool.submit(programs.kernel_times, topology)
        compiled = {name: programs.compiled(name) for name in phases}
        found = {name: _phase(programs, topology, name, *compiled[name], times.result()) for name in phases}
    return ServingPlan(
        topology=topology,
        chips=len(devices),
        mesh=dict(programs.mesh.shape),
        streams=streams,
        chunk_blocks=chunk,
        capacity=chip_of(topology).hbm_bytes,
        parameters=local_bytes(programs.params),
        memory=local_bytes(programs.state.layers),
        stream=stream_bytes(config.model),
        loading=_loading_bytes(config, programs),
        phases=found,
    )


def _loading_bytes(config: Config, programs: "_Programs") -> int:
    """As `fam_jax.restore` loads: what is saved beside what is used; without LoRA, beside its largest part."""

    def saved() -> Any:
        return lora.stored(to_dict(nnx.state(create_model(config, rngs=nnx.Rngs(0)))), config)

    shapes = jax.eval_shape(saved)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        param_shardings(shapes, programs.mesh),
    )
    used = jax.tree.leaves(programs.params)
    return local_bytes(placed) + (local_bytes(used) if config.lora.rank else max(map(local_bytes, used)))


def stream_bytes(model: ModelConfig) -> int:
    """Of the memory of one stream, however much it has read."""
    calls = compiled_calls(model, None, 1)
    memory = jax.eval_shape(calls.start, to_dict(structure(model)[1]))
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.shape) for x in jax.tree.leaves(memory))


class _Programs:
    """What is compiled, and its arguments as `jax.ShapeDtypeStruct`s with shardings."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, streams: int, chunk_blocks: int):
        model = config.model
        self.config, self.mesh, self.streams = config, mesh, streams
        self.tokens = chunk_blocks * model.block_size  # of a stream, in a chunk
        self.calls = compiled_calls(model, mesh, streams)
        shapes = to_dict(structure(model)[1])
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x, where: jax.ShapeDtypeStruct(
                x.shape, dtype_of_use(path, x, model), sharding=where
            ),
            shapes,
            param_shardings(shapes, mesh),
        )
        self.state: StreamState = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(self.calls.start, self.params),
            state_sharding(mesh, model, streams),
        )

    def kernel_times(self, topology: str) -> dict[str, tuple[float, float]]:
        """Of attention over a chunk; decoding has no kernels."""
        model = self.config.model
        return kernels_of_types(
            topology,
            model,
            self.mesh.shape,
            self.streams,
            self.tokens,
            past=model.memory_segments,
            gradient=False,
        )

    def compiled(self, phase: str) -> tuple[jax.stages.Compiled | int, float]:
        """The executable or the bytes that are missing, and the seconds of compilation."""
        started = time.perf_counter()
        traced = getattr(self, phase)()
        result = compile_or_miss(traced.lower(lowering_platforms=("tpu",)))
        return result, time.perf_counter() - started

    def prefill(self) -> Any:
        """As in `Streamer.read`."""
        call: Any = self.calls.read_blocks
        return call.trace(self.params, state=self.state, tokens=self._rows())

    def measure(self) -> Any:
        """As in `Streamer.measure`, for `fam_jax.evaluate.text`."""
        call: Any = self.calls.measure_blocks
        width = min(max(1, self.config.train.loss_chunk // self.streams), self.tokens)
        return call.trace(
            self.params, state=self.state, inputs=self._rows(), targets=self._rows(), width=width
        )

    def decode(self) -> Any:
        """As in `Streamer.generate`."""
        call: Any = self.calls.decode
        whole = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(self.mesh))
        number = whole((), jnp.int32)
        logits = jnp.promote_types(self.config.model.dtype, jnp.float32)
        return call.trace(
            self.params, state=self.state, logits=whole((self.streams, self.config.model.vocab_size), logits),
            stopped=whole((self.streams,), bool), key=jax.eval_shape(lambda: jax.random.key(0)), begin=number,
            limit=number, stop_tokens=whole((1,), jnp.int32), sampling=GREEDY, width=TOKENS_PER_CALL,
        )  # fmt: skip

    def _rows(self) -> jax.ShapeDtypeStruct:
        where = rows_sharding(self.mesh, self.streams)
        return jax.ShapeDtypeStruct((self.streams, self.tokens), jnp.int32, sharding=where)


def _phase(
    programs: _Programs,
    topology: str,
    name: str,
    compiled: jax.stages.Compiled | int,
    compile_seconds: float,
    kernels: dict[str, tuple[float, float]],
) -> Phase:
    model, streams = programs.config.model, programs.streams
    # A memory passed in stays valid: the program consumes a copy of it.
    chip = chip_of(topology)
    peak = peak_bytes(compiled, chip) + local_bytes(programs.state.layers)
    tokens = streams * (1 if name == "decode" else programs.tokens)
    if isinstance(compiled, int):
        return Phase(tokens, peak, None, compile_seconds, {})
    module = parse(compiled.as_text() or "")

    def cost(closing: float) -> Estimate:
        return estimate(
            module, chip, list(programs.mesh.devices.flat), kernels,
            loops=TOKENS_PER_CALL, shares=_shares(model, closing),
        )  # fmt: skip

    found = cost(0)
    if name != "decode":
        seconds = found.seconds_low, found.seconds_high
        details: dict[str, Any] = {}
        for length in LENGTHS:
            low, high = (length / programs.tokens * step for step in seconds)
            details |= {f"read_{length}_seconds_low": low, f"read_{length}_seconds_high": high}
        return Phase(tokens, peak, seconds, compile_seconds, details | {"collectives": found.collectives})
    closing = cost(1)
    low, high = found.seconds_low / TOKENS_PER_CALL, found.seconds_high / TOKENS_PER_CALL
    border_low = closing.seconds_low / TOKENS_PER_CALL - low
    border_high = closing.seconds_high / TOKENS_PER_CALL - high
    # All streams may reach the border together, or each at a token of its own.
    size = model.block_size
    seconds = low + border_low / size, high + border_high * min(streams, size) / size
    details = {"border_seconds_low": border_low, "border_seconds_high": border_high}
    per_token = {
        kind: {key: value if key == "hidden" else value / TOKENS_PER_CALL for key, value in sums.items()}
        for kind, sums in found.collectives.items()
    }
    return Phase(tokens, peak, seconds, compile_seconds, details | {"collectives": per_token})


def _shares(model: ModelConfig, closing: float) -> Shares:
    """Of the kinds of layers; and of the branch that closes a block, which lies in the loop over tokens alone."""
    kinds = shares_of_types(model)

    def shares(op: Op) -> Sequence[float] | None:
        if op.source.startswith("jit(decode)") and op.source.count("while/body") == 1:
            return [1 - closing, closing]
        return kinds(op)

    return shares


def serving_meshes(config: Config, topology: str, streams: int) -> list[MeshConfig]:
    """Meshes worth trying, the likeliest first: heads over as many chips as divide them, the rest over data or fsdp.

    With weights over tensor, a step moves activations and no weights.
    """
    model = config.model
    chips, found = len(topology_devices(topology)), []
    for tensor in (ways for ways in range(chips, 0, -1) if chips % ways == 0):
        heads = model.num_heads % tensor == 0 and (
            model.num_kv_heads % tensor == 0 or model.num_kv_heads == 1
        )
        if not heads or model.ff_dim % tensor or model.vocab_size % tensor:
            continue
        rest = chips // tensor
        if streams % rest == 0:
            found.append(MeshConfig(data=rest, fsdp=1, tensor=tensor))
        if rest > 1 and model.model_dim % rest == 0:
            found.append(MeshConfig(data=1, fsdp=rest, tensor=tensor))
    return found[:MESHES]


def best_serving(plans: Sequence[ServingPlan]) -> ServingPlan:
    """Of those that fit, the one with the fastest last phase, by the middle of its range; else the smallest."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: max(plan.peak, plan.loading))
    return min(fitting, key=lambda plan: sum([*plan.phases.values()][-1].seconds or ()))


def serving_advice(config: Config, plan: ServingPlan) -> str:
    """How much memory is missing, and what would help."""
    missing = (max(plan.peak, plan.loading) - plan.capacity) / GIB
    helps = []
    if jnp.dtype(config.model.dtype).itemsize > 2:
        helps.append("config.model.dtype=bfloat16")
    if plan.mesh["data"] > 1 and plan.parameters > plan.memory:
        helps.append("a larger config.mesh.tensor or fsdp in place of data")
    if plan.memory * 4 > plan.capacity and plan.streams > 1:
        helps.append(f"--streams={plan.streams // 2}")
    if plan.chunk_blocks > 1 and plan.parameters < plan.capacity < plan.peak:
        helps.append(f"--chunk_blocks={max(plan.chunk_blocks // 4, 1)}")
    if "measure" in plan.phases and plan.parameters < plan.capacity < plan.peak:
        helps.append("a smaller config.train.loss_chunk")
    helps.append("more chips")
    when = "" if plan.peak > plan.capacity else " while it loads"
    return (
        f"{missing:.1f} GiB too much for a chip's {plan.capacity / GIB:.0f} GiB{when}; try {', '.join(helps)}"
    )
