"""Estimate memory and time of generation and evaluation on a slice: compile the real programs and add up their costs.

There are three phases. *Prefill* reads a chunk of whole blocks of every stream. *Decode* writes one token of every
stream and updates a stream's state when a block is complete. *Measure* is prefill that also computes the loss of every
token, for evaluation on held-out text. The state of a stream has the same size in all phases.
"""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import Config, MeshConfig, ModelConfig
from fam_jax.generation.compiled import compiled_calls, rows_sharding, state_sharding, structure
from fam_jax.generation.sampling import GREEDY
from fam_jax.generation.text import TOKENS_PER_CALL
from fam_jax.model import StreamState, create_model, lora, to_dict
from fam_jax.plan.chips import GIB, chip_of
from fam_jax.plan.compile import compile_or_miss, local_bytes, peak_bytes, topology_devices
from fam_jax.plan.cost import Estimate, estimate
from fam_jax.plan.hlo import Op, Shares, parse
from fam_jax.plan.layer_costs import kernels_of_types, local_share, shares_of_types
from fam_jax.restore import dtype_of_use
from fam_jax.sharding import make_mesh, param_shardings, replicated

SERVE = ("prefill", "decode")
# Number of meshes to try.
MESHES = 4
# Lengths of streams, in tokens, whose reading time reports give.
LENGTHS = (100_000, 1_000_000)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Estimates for one program on one mesh."""

    # Tokens of all streams in a step.
    tokens: int
    # Bytes of a chip's HBM.
    peak: int
    # Seconds of a step, low and high; None if the program does not fit.
    seconds: tuple[float, float] | None
    compile_seconds: float
    # More entries of the report.
    details: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """Return the phase's part of the JSON file."""
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
    """Estimates for reading and writing streams on one mesh. Sizes are bytes on a chip unless stated otherwise."""

    topology: str
    chips: int
    mesh: dict[str, int]
    streams: int
    chunk_blocks: int
    # HBM.
    capacity: int
    parameters: int
    # States of all streams.
    state: int
    # State of one stream, over all chips.
    stream: int
    # HBM in use while a checkpoint is restored.
    loading: int
    phases: dict[str, Phase]

    @property
    def peak(self) -> int:
        """Bytes of HBM in the phase that needs most."""
        return max(phase.peak for phase in self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether all phases and the loading of a checkpoint fit."""
        return max(self.peak, self.loading) <= self.capacity

    def report(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
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
            "hbm_memory_bytes": self.state,
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
    """Compile programs of :class:`fam_jax.generation.streaming.Streamer` for a slice and estimate their costs.

    Args:
      config: the run's config.
      topology: such as v5e:4x4.
      streams: number of streams that are read and written together.
      phases: any of prefill, decode and measure.
      mesh: replaces the config's mesh.
      chunk_blocks: blocks that go through the model at once; the default is that of evaluation.

    Raises:
      UserError: the topology is unknown, or the TPU compiler is not installed.
      ConfigError: the mesh does not fit the slice or the model.
    """
    devices = topology_devices(topology)
    chunk = chunk_blocks or config.evaluate.chunk_blocks
    programs = _Programs(config, topology, make_mesh(mesh or config.mesh, devices), streams, chunk)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Kernels are profiled in other processes while this one compiles.
        times = pool.submit(programs.kernel_times)
        compiled = {name: programs.compiled(name) for name in phases}
        found = {name: programs.phase(name, compiled[name], times.result()) for name in phases}
    return ServingPlan(
        topology=topology,
        chips=len(devices),
        mesh=dict(programs.mesh.shape),
        streams=streams,
        chunk_blocks=chunk,
        capacity=chip_of(topology).hbm_bytes,
        parameters=local_bytes(programs.params),
        state=local_bytes(programs.state.layers),
        stream=stream_bytes(config.model),
        loading=_loading_bytes(config, programs),
        phases=found,
    )


def _loading_bytes(config: Config, programs: "_Programs") -> int:
    """Return the bytes on a chip while `fam_jax.restore` loads a checkpoint.

    With LoRA, the saved parameters and all parameters in use exist at the same time. Without, the saved parameters and
    the largest one in use do.
    """

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
    """Return the bytes of one stream's state, which does not grow with the stream."""
    calls = compiled_calls(model, None, 1)
    state = jax.eval_shape(calls.start, to_dict(structure(model)[1]))
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.shape) for x in jax.tree.leaves(state))


class _Compiled(NamedTuple):
    """A compiled program."""

    # The executable or, if the program does not fit, the missing bytes.
    result: jax.stages.Compiled | int
    # Seconds of compilation.
    seconds: float


class _Programs:
    """The programs of a streamer, and their arguments as `jax.ShapeDtypeStruct` with shardings."""

    def __init__(
        self, config: Config, topology: str, mesh: jax.sharding.Mesh, streams: int, chunk_blocks: int
    ):
        model = config.model
        self.config, self.topology, self.mesh, self.streams = config, topology, mesh, streams
        # Tokens of a stream in a chunk.
        self.tokens = chunk_blocks * model.block_size
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

    def kernel_times(self) -> dict[str, tuple[float, float]]:
        """Return the seconds of the kernels of a chunk. Decoding runs no kernels."""
        model = self.config.model
        share = local_share(
            model,
            self.topology,
            self.mesh.shape,
            self.streams,
            self.tokens,
            past=model.memory_segments,
            gradient=False,
        )
        return kernels_of_types(model, share)

    def compiled(self, phase: str) -> _Compiled:
        """Compile the program of a phase."""
        started = time.perf_counter()
        traced = getattr(self, phase)()
        result = compile_or_miss(traced.lower(lowering_platforms=("tpu",)))
        return _Compiled(result, time.perf_counter() - started)

    def prefill(self) -> Any:
        """Trace the program of `Streamer.read`."""
        call: Any = self.calls.read_blocks
        return call.trace(self.params, state=self.state, tokens=self._rows())

    def measure(self) -> Any:
        """Trace the program of `Streamer.measure`, as `fam_jax.evaluation.text` calls it."""
        call: Any = self.calls.measure_blocks
        width = min(max(1, self.config.train.loss_chunk // self.streams), self.tokens)
        return call.trace(
            self.params, state=self.state, inputs=self._rows(), targets=self._rows(), width=width
        )

    def decode(self) -> Any:
        """Trace the program of `Streamer.generate`."""
        call: Any = self.calls.decode
        whole = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(self.mesh))
        numbers = whole((self.streams,), jnp.int32)
        logits = jnp.promote_types(self.config.model.dtype, jnp.float32)
        return call.trace(
            self.params,
            state=self.state,
            logits=whole((self.streams, self.config.model.vocab_size), logits),
            stopped=whole((self.streams,), bool),
            keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.streams)),
            begin=numbers,
            limits=numbers,
            stop_tokens=whole((1,), jnp.int32),
            sampling=GREEDY,
            width=TOKENS_PER_CALL,
        )

    def phase(self, name: str, compiled: _Compiled, kernels: dict[str, tuple[float, float]]) -> Phase:
        """Return the estimates for the program of a phase, given the seconds of its kernels."""
        chip = chip_of(self.topology)
        # The caller's state stays valid, so the program updates a copy.
        peak = peak_bytes(compiled.result, chip) + local_bytes(self.state.layers)
        tokens = self.streams * (1 if name == "decode" else self.tokens)
        if isinstance(compiled.result, int):
            return Phase(tokens, peak, None, compiled.seconds, {})
        module = parse(compiled.result.as_text() or "")

        def cost(closing: float) -> Estimate:
            shares = _shares(self.config.model, closing)
            devices = list(self.mesh.devices.flat)
            return estimate(module, chip, devices, kernels, loops=TOKENS_PER_CALL, shares=shares)

        if name == "decode":
            seconds, details = self._per_token(cost(closing=0), cost(closing=1))
        else:
            found = cost(closing=0)
            seconds, details = (found.seconds_low, found.seconds_high), {"collectives": found.collectives}
            reading: dict[str, Any] = {}
            for length in LENGTHS:
                low, high = (length / self.tokens * step for step in seconds)
                reading |= {f"read_{length}_seconds_low": low, f"read_{length}_seconds_high": high}
            details = reading | details
        return Phase(tokens, peak, seconds, compiled.seconds, details)

    def _per_token(self, within: Estimate, closing: Estimate) -> tuple[tuple[float, float], dict[str, Any]]:
        """Return seconds and details of decoding a token, from the costs of closing no block and one per token."""
        low, high = within.seconds_low / TOKENS_PER_CALL, within.seconds_high / TOKENS_PER_CALL
        border_low = closing.seconds_low / TOKENS_PER_CALL - low
        border_high = closing.seconds_high / TOKENS_PER_CALL - high
        # Either all streams complete a block at the same token, or each at a different one.
        size = self.config.model.block_size
        seconds = low + border_low / size, high + border_high * min(self.streams, size) / size
        per_token = {
            kind: {key: value if key == "hidden" else value / TOKENS_PER_CALL for key, value in sums.items()}
            for kind, sums in within.collectives.items()
        }
        details = {"border_seconds_low": border_low, "border_seconds_high": border_high}
        return seconds, details | {"collectives": per_token}

    def _rows(self) -> jax.ShapeDtypeStruct:
        where = rows_sharding(self.mesh, self.streams)
        return jax.ShapeDtypeStruct((self.streams, self.tokens), jnp.int32, sharding=where)


def _shares(model: ModelConfig, closing: float) -> Shares:
    """Return how often conditionals take each branch.

    Args:
      model: the model's config, which decides conditionals over layer types.
      closing: how often the conditional in the loop over tokens takes the branch that closes a block.
    """
    of_types = shares_of_types(model)

    def shares(op: Op) -> Sequence[float] | None:
        if op.source.startswith("jit(decode)") and op.source.count("while/body") == 1:
            return [1 - closing, closing]
        return of_types(op)

    return shares


def serving_meshes(config: Config, topology: str, streams: int) -> list[MeshConfig]:
    """Return meshes worth trying, the most promising first.

    Heads are divided over as many chips as possible, because then a step moves activations and no weights. The other
    chips go to data or fsdp.
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
    """Return the plan that fits and has the fastest last phase; if none fits, the one that needs the least memory.

    Phases are compared at the middle of their ranges.
    """
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: max(plan.peak, plan.loading))
    return min(fitting, key=lambda plan: sum([*plan.phases.values()][-1].seconds or ()))


def serving_advice(config: Config, plan: ServingPlan) -> str:
    """Say how much memory is missing and what would help."""
    missing = (max(plan.peak, plan.loading) - plan.capacity) / GIB
    helps = []
    if jnp.dtype(config.model.dtype).itemsize > 2:
        helps.append("config.model.dtype=bfloat16")
    if plan.mesh["data"] > 1 and plan.parameters > plan.state:
        helps.append("a larger config.mesh.tensor or fsdp in place of data")
    if plan.state * 4 > plan.capacity and plan.streams > 1:
        helps.append(f"--streams={plan.streams // 2}")
    if plan.chunk_blocks > 1 and plan.parameters < plan.capacity < plan.peak:
        helps.append(f"--chunk_blocks={max(plan.chunk_blocks // 4, 1)}")
    if "measure" in plan.phases and plan.parameters < plan.capacity < plan.peak:
        helps.append("a smaller config.train.loss_chunk")
    helps.append("more chips")
    when = "" if plan.peak > plan.capacity else " while loading"
    return (
        f"{missing:.1f} GiB too much for a chip's {plan.capacity / GIB:.0f} GiB{when}; try {', '.join(helps)}"
    )
