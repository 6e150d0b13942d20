"""Estimate memory, time and traffic of a training step on a slice: compile the real step and add up its operations."""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax

from fam_jax.config import Config, MeshConfig, ceil_div
from fam_jax.model.truncation import truncation_of
from fam_jax.plan.chips import GIB, Chip, chip_of
from fam_jax.plan.compile import compile_or_miss, local_bytes, peak_bytes, topology_devices
from fam_jax.plan.cost import Estimate, estimate
from fam_jax.plan.hlo import parse
from fam_jax.plan.layer_costs import kernels_of_types, local_share, shares_of_types
from fam_jax.sharding import batch_sharding
from fam_jax.training.flops import step_flops
from fam_jax.training.loop import Trainer, make_trainer
from fam_jax.training.step import BATCH_TYPES, START


@dataclasses.dataclass(frozen=True)
class HbmUse:
    """Bytes of HBM of one chip."""

    peak: int
    capacity: int
    parameters: int
    optimizer: int
    # Everything that exists only during a step: the peak minus parameters and optimizer state.
    activations: int

    @property
    def fits(self) -> bool:
        """Whether the peak is below the capacity."""
        return self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Estimates for a step on one mesh."""

    topology: str
    chips: int
    mesh: dict[str, int]
    # Tokens in the batch of a step.
    tokens: int
    memory: HbmUse
    # None if the program does not fit, because it is then not compiled.
    cost: Estimate | None
    # FLOPs of a step on all chips.
    model_flops: float
    compile_seconds: float

    def report(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        memory = self.memory
        found: dict[str, Any] = {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            "fits": memory.fits,
            "hbm_peak_bytes": memory.peak,
            "hbm_capacity_bytes": memory.capacity,
            "hbm_parameter_bytes": memory.parameters,
            "hbm_optimizer_bytes": memory.optimizer,
            "hbm_activation_bytes": memory.activations,
            "tokens_per_step": self.tokens,
            "model_flops": self.model_flops,
            "compile_seconds": self.compile_seconds,
        }
        if self.cost is None:
            return found
        peak = self.chips * chip_of(self.topology).flops
        low, high = self.cost.seconds_low, self.cost.seconds_high
        return found | {
            "step_seconds_low": low,
            "step_seconds_high": high,
            "tokens_per_second_low": self.tokens / high,
            "tokens_per_second_high": self.tokens / low,
            "mfu_low": self.model_flops / peak / high,
            "mfu_high": self.model_flops / peak / low,
            "compiled_flops": self.cost.total("flops") * self.chips,
            "seconds": {
                kind: {"low": self.cost.total("low", kind), "high": self.cost.total("high", kind)}
                for kind in ("product", "kernel", "vector")
            },
            "collectives": self.cost.collectives,
        }


def plan_training(config: Config, topology: str, tokens: int, mesh: MeshConfig | None = None) -> TrainingPlan:
    """Compile the train step for a slice and estimate its cost.

    Args:
      config: the run's config.
      topology: such as v5p:4x4x8.
      tokens: T, length of the rows.
      mesh: replaces the config's mesh.

    Raises:
      UserError: the topology is unknown, or the TPU compiler is not installed.
      ConfigError: the mesh does not fit the slice, the batch or the model.
    """
    chip, devices = chip_of(topology), topology_devices(topology)
    config = dataclasses.replace(config, mesh=mesh or config.mesh)
    trainer = make_trainer(config, devices)
    rows = config.train.batch_size // config.train.accumulation
    parts = truncation_of(config.train).parts(tokens, config.model.block_size)
    sees_past = config.train.carry == "all" or len(parts) > 1
    share = local_share(
        config.model,
        topology,
        trainer.mesh.shape,
        rows,
        # The kernels run once per part; parts that differ in length count as their mean.
        ceil_div(tokens, len(parts)),
        past=config.model.memory_segments if sees_past else 0,
    )
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Kernels are profiled in other processes while this one compiles.
        profile = pool.submit(kernels_of_types, config.model, share)
        executable = _compile(trainer, config.train.batch_size, tokens)
        seconds = time.perf_counter() - started
        times = profile.result()
    cost = None
    if isinstance(executable, jax.stages.Compiled):
        module = parse(executable.as_text() or "")
        ordered = list(trainer.mesh.devices.flat)
        cost = estimate(module, chip, ordered, times, shares=shares_of_types(config.model))
    return TrainingPlan(
        topology=topology,
        chips=len(devices),
        mesh=dict(trainer.mesh.shape),
        tokens=config.train.batch_size * tokens,
        memory=_memory(trainer, executable, chip),
        cost=cost,
        model_flops=step_flops(config, trainer.state_shapes.params, tokens),
        compile_seconds=seconds,
    )


def _compile(trainer: Trainer, batch: int, tokens: int) -> jax.stages.Compiled | int:
    """Return the executable or, if the program does not fit, the missing bytes."""
    rows = batch_sharding(trainer.mesh)
    arrays = {
        name: jax.ShapeDtypeStruct((batch, tokens), dtype, sharding=rows)
        for name, dtype in BATCH_TYPES.items()
    }
    if trainer.config.train.carry != "none":
        arrays[START] = jax.ShapeDtypeStruct((batch,), bool, sharding=rows)
    lowered = trainer.step.trace(trainer.state_shapes, arrays).lower(lowering_platforms=("tpu",))  # type: ignore[attr-defined]
    return compile_or_miss(lowered)


def _memory(trainer: Trainer, executable: jax.stages.Compiled | int, chip: Chip) -> HbmUse:
    state = trainer.state_shapes
    parameters, optimizer = (local_bytes(tree) for tree in (state.params, state.optimizer))
    peak = peak_bytes(executable, chip)
    return HbmUse(peak, chip.hbm_bytes, parameters, optimizer, max(peak - parameters - optimizer, 0))


def sensible_meshes(config: Config, topology: str) -> list[MeshConfig]:
    """Return meshes worth trying on a slice, the most promising first.

    Weights are divided over whole axes of the torus, but not over the whole slice, because the compiler would replace
    reduce-scatters by all-reduces there. Heads are divided over 1, 2 or 4 chips.
    """
    model, rows = config.model, config.train.batch_size // config.train.accumulation
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    chips, found = math.prod(sides), []
    for tensor in (1, 2, 4):
        divides = model.num_heads % tensor == 0 and (
            model.num_kv_heads % tensor == 0 or model.num_kv_heads == 1
        )
        if not divides or model.ff_dim % tensor or model.vocab_size % tensor or chips % tensor:
            continue
        for data in dict.fromkeys(sorted(sides)):
            ways, fsdp = chips // tensor, chips // tensor // data
            if rows % ways == 0 and ways % data == 0 and fsdp > 1 and model.model_dim % fsdp == 0:
                found.append(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    return found


def best_plan(plans: Sequence[TrainingPlan]) -> TrainingPlan:
    """Return the plan that fits and is fastest; if none fits, the one with the lowest peak.

    Steps are compared at the middle of their ranges.
    """
    fitting = [plan for plan in plans if plan.memory.fits and plan.cost is not None]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory.peak)
    return min(fitting, key=lambda plan: plan.cost.seconds_low + plan.cost.seconds_high)  # type: ignore[union-attr]


def advice(config: Config, plan: TrainingPlan) -> str:
    """Say how much memory is missing and what would help."""
    missing = (plan.memory.peak - plan.memory.capacity) / GIB
    rows = config.train.batch_size // config.train.accumulation
    helps = []
    if config.model.remat != "full":
        helps.append("config.model.remat=full")
    if rows > plan.mesh["data"] * plan.mesh["fsdp"]:
        helps.append(f"config.train.accumulation={2 * config.train.accumulation}")
    if plan.mesh["data"] > 1:
        helps.append("a larger config.mesh.fsdp in place of data")
    if config.lora.rank == 0:
        helps.append("LoRA (config.lora.rank)")
    helps.append("more chips")
    return f"{missing:.1f} GiB too much for a chip's {plan.memory.capacity / GIB:.0f} GiB; try {', '.join(helps)}"
