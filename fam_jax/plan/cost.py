"""Time, FLOPs and bytes of a compiled program, op by op: a range, since nothing here was checked against hardware.

The low end of an operation is the longest of three: its products at `PEAK_SHARE` of the matrix units' peak, its traffic
at the full bandwidth of HBM, and the static profile where there is one. The high end is XLA's own cost model, which is
pessimistic about all that hangs on HBM. A collective takes its bytes on the wire, round a ring: along every axis of the
torus that its group spans (low), or along one (high).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fam_jax.plan.chips import Chip
from fam_jax.plan.hlo import Computation, Module, Op, Shares, product_flops, replica_group

PEAK_SHARE = 0.95  # of the matrix units' peak that a large product reaches at best

# A kernel that reads a block of each operand; the seconds given for it include its traffic.
READS_BLOCKS = "update_attention"

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# A fusion of an all-reduce and the slice of its result that stays: the compiler's form of a reduce-scatter.
SCATTER = "all-reduce-scatter"

# These take no time of their own: names for what is there, and the two ends of transfers in the background.
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "opt-barrier", "iota", "copy-start", "copy-done", "slice-start", "slice-done", "async-update", "async-done",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One operation of the program, all its runs together."""

    name: str
    kind: str  # product | kernel | vector | a collective
    source: str  # in the traced program
    times: float  # it runs
    low: float  # seconds
    high: float
    flops: float = 0.0
    hbm_bytes: float = 0.0
    wire_bytes: float = 0.0  # that each chip sends
    hidden: bool = False  # a collective that runs beside other work


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a whole program, on one chip."""

    ops: tuple[OpCost, ...]

    def total(self, field: str, *kinds: str, hidden: bool | None = None) -> float:
        """Sum of a field over operations of some kinds, by default over all."""
        return sum(
            getattr(op, field)
            for op in self.ops
            if (not kinds or op.kind in kinds) and hidden in (None, op.hidden)
        )

    @property
    def seconds_low(self) -> float:
        """Collectives in the background cost nothing as long as there is work to hide them."""
        shown = self.total("low", hidden=False)
        return max(shown, self.total("low", hidden=True))

    @property
    def seconds_high(self) -> float:
        """No collective is hidden."""
        return self.total("high")

    @property
    def collectives(self) -> dict[str, dict[str, float]]:
        """By kind: runs, bytes that each chip sends, seconds low and high, and the share of the bytes hidden."""
        found = {}
        for kind in COLLECTIVES:
            ops = [op for op in self.ops if op.kind == kind]
            if ops:
                sent = sum(op.wire_bytes for op in ops)
                hidden = sum(op.wire_bytes for op in ops if op.hidden)
                found[kind] = {
                    "runs": sum(op.times for op in ops),
                    "bytes": sent,
                    "seconds_low": sum(op.low for op in ops),
                    "seconds_high": sum(op.high for op in ops),
                    "hidden": hidden / sent if sent else 0.0,
                }
        return found

    def longest(self, count: int) -> list[OpCost]:
        """By their high ends."""
        return sorted(self.ops, key=lambda op: -op.high)[:count]


def estimate(
    module: Module,
    chip: Chip,
    devices: Sequence[jax.Device] = (),
    kernels: Mapping[str, tuple[float, float]] | None = None,
    *,
    loops: int | None = None,
    shares: Shares | None = None,
) -> Estimate:
    """Adds up a program.

    Args:
      module: of :func:`fam_jax.plan.hlo.parse`.
      chip: that it was compiled for.
      devices: in the order of the mesh; a single one, or none, where there are no collectives.
      kernels: seconds, low and high, of one run of each Pallas kernel, by a pattern (regular expression) that is found
        in its place in the traced program, or in its name.
      loops: as of :meth:`fam_jax.plan.hlo.Module.walk`.
      shares: likewise.

    Raises:
      ValueError: a kernel whose time is not given, or a loop or collective that is not understood.
    """
    costs = []
    counted: set[tuple[int, str | None]] = set()
    for op, computation, times in module.walk(loops=loops, shares=shares):
        if op.opcode in FREE or op.opcode.endswith("-done"):
            continue
        collective, inner, hidden = _collective(module, op, computation)
        channel = (id(computation), collective.attribute(r"channel_id=(\d+)")) if collective else (0, None)
        # One that is spread over several fusions stands in each of them, on the same channel.
        if collective is not None and not (hidden and channel in counted):
            counted.add(channel)
            scatter = op.opcode == "fusion" and not hidden
            kind = "reduce-scatter" if scatter else collective.opcode.removesuffix("-start")
            costs.append(_collective_cost(collective, kind, inner, times, chip, devices, hidden))
            if op is collective or scatter:
                continue
        cost = _compute_cost(module, op, computation, times, chip, kernels or {})
        if cost is not None:
            costs.append(cost)
    return Estimate(tuple(costs))


def _collective(module: Module, op: Op, computation: Computation) -> tuple[Op | None, Computation, bool]:
    """The collective that `op` is or that a fusion carries along with its own work, and whether that hides it."""
    if op.opcode.removesuffix("-start") in COLLECTIVES:
        return op, computation, op.opcode.endswith("-start")
    if op.opcode == "fusion":
        fused = module.computations[op.called[0]]
        for inner in fused.values():
            if inner.opcode.removesuffix("-start") in COLLECTIVES:
                return inner, fused, not op.called[0].startswith(SCATTER)
    return None, computation, False


def _collective_cost(
    op: Op,
    kind: str,
    computation: Computation,
    times: float,
    chip: Chip,
    devices: Sequence[jax.Device],
    hidden: bool,
) -> OpCost:
    group = replica_group(op)
    count = max(len(group), 1)
    whole = max(
        sum(array.bytes for array in op.results) if not op.opcode.endswith("-start") else 0,
        max((array.bytes for array in op.results), default=0),
        sum(computation[name].result_bytes(hbm_only=False) for name in op.operands if name in computation),
    )
    share = (count - 1) / count
    sent = times * whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    slowest = sent / chip.ring_bandwidth if count > 1 else 0.0
    rings = 1 if kind == "collective-permute" else spanned_axes([devices[i] for i in group if devices])
    return OpCost(
        op.name, kind, op.source, times, slowest / rings, slowest, wire_bytes=sent, hidden=hidden
    )  # fmt: skip


def spanned_axes(devices: Sequence[jax.Device]) -> int:
    """Along how many axes of the torus devices differ; at least 1."""
    if len(devices) < 2:
        return 1
    coordinates = np.array([device.coords for device in devices])
    return max(1, int((coordinates != coordinates[0]).any(axis=0).sum()))


def _compute_cost(
    module: Module,
    op: Op,
    computation: Computation,
    times: float,
    chip: Chip,
    kernels: Mapping[str, tuple[float, float]],
) -> OpCost | None:
    modelled = _cycles(op, "window_config") / chip.clock
    profiled = _cycles(op, "bundle_analysis_data") / chip.clock
    traffic = hbm_bytes(module, op, computation)
    if op.opcode == "custom-call":
        if 'custom_call_target="tpu_custom_call"' not in op.attributes:
            # Annotations and allocations; those that do work say how much.
            return (
                OpCost(op.name, "vector", op.source, times, times * modelled, times * modelled)
                if modelled
                else None
            )
        place = f"{op.source} {op.name}"
        pattern = next((pattern for pattern in kernels if re.search(pattern, place)), None)
        if pattern is None:
            raise ValueError(f"no time is known of the kernel {op.name}")
        if READS_BLOCKS in op.name:
            traffic = 0
        low, high = (times * max(seconds, traffic / chip.hbm_bandwidth) for seconds in kernels[pattern])
        return OpCost(op.name, "kernel", op.source, times, low, high, hbm_bytes=times * traffic)
    flops = 0
    if op.opcode == "fusion":
        flops = module.flops(op.called[0])
    elif op.opcode in ("convolution", "dot"):
        flops = product_flops(op, computation)
    low = max(flops / chip.flops / PEAK_SHARE, traffic / chip.hbm_bandwidth, profiled)
    return OpCost(
        op.name,
        "product" if flops else "vector",
        op.source,
        times,
        times * low,
        times * max(low, modelled),
        flops=times * flops,
        hbm_bytes=times * traffic,
    )


def _cycles(op: Op, section: str) -> int:
    """The compiler's figure in a section of the backend's configuration; 0 if it gives none."""
    found = op.attribute(rf'"{section}":\{{[^}}]*?"estimated_cycles":"(\d+)"')
    cycles = int(found or 0)
    return cycles if cycles < 2**60 else 0  # the largest integer stands for "unknown"


def hbm_bytes(module: Module, op: Op, computation: Computation) -> int:
    """Traffic of one run. Of a sliced operand only the slice counts, of one updated in place only the update."""
    if op.opcode == "dynamic-slice":
        return 2 * op.result_bytes()
    if op.opcode == "dynamic-update-slice":
        update = computation.get(op.operands[1])
        return 2 * update.result_bytes() if update else 0
    operands = [computation[name] for name in op.operands if name in computation]
    if op.opcode != "fusion":
        return op.result_bytes() + sum(x.result_bytes() for x in operands)
    fused = module.computations[op.called[0]]
    total = _written(fused, op)
    for inner in fused.values():
        if inner.opcode == "parameter" and (source := computation.get(op.operands[int(inner.literal)])):
            total += int(min(source.result_bytes(), _read(module, fused, inner.name)))
    return total


def _read(module: Module, fused: Computation, name: str) -> float:
    """Bytes of a fusion's parameter that its users take; infinity for the whole."""
    total = 0.0
    for user, place in _users(fused)[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            total += user.result_bytes(hbm_only=False)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        elif user.opcode == "tuple" or user.opcode in COLLECTIVES:
            continue  # handed on, or the collective's own
        elif user.opcode == "bitcast":
            total += _read(module, fused, user.name)
        elif user.opcode == "fusion":
            nested = module.computations[user.called[0]]
            inner = [x.name for x in nested.values() if x.opcode == "parameter" and int(x.literal) == place]
            total += sum(_read(module, nested, x) for x in inner)
        else:
            return math.inf
    return total


def _users(computation: Computation) -> Mapping[str, list[tuple[Op, int]]]:
    users = collections.defaultdict(list)
    for op in computation.values():
        for place, name in enumerate(op.operands):
            users[name].append((op, place))
    return users


def _written(fused: Computation, op: Op) -> int:
    """Bytes of a fusion's results; of one that updates an operand in place, those of the update."""
    (root,) = (x for x in fused.values() if x.is_root)
    leaves = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for leaf, result in zip(leaves, op.results, strict=False):
        size = result.bytes if result.in_hbm else 0
        while leaf.opcode == "bitcast" and leaf.operands[0] in fused:
            leaf = fused[leaf.operands[0]]
        if leaf.opcode == "parameter" or leaf.opcode in COLLECTIVES:
            size = 0  # handed on, or the collective's own
        elif leaf.opcode == "dynamic-update-slice" and (update := fused.get(leaf.operands[1])):
            size = min(size, update.result_bytes(hbm_only=False))
        total += size
    return total
