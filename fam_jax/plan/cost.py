"""Estimate time, FLOPs and bytes of a compiled program, op by op.

Times are ranges, because they were never checked against hardware. The low end of an operation is the longest of three
times: its matrix products at `PEAK_SHARE` of the peak, its traffic at the full bandwidth of HBM, and its static profile
if there is one. The high end is XLA's own cost model, which is pessimistic about everything limited by HBM. Collectives
send their bytes around a ring: along all axes of the torus that the group spans (low), or along one (high).
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

# Share of the matrix units' peak that a large product reaches at best.
PEAK_SHARE = 0.95

# In the names of kernels that read one block of each operand. Their given times include traffic.
READS_BLOCKS = "update_attention"

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# The compiler's form of a reduce-scatter: a fusion of an all-reduce and a slice of its result.
SCATTER = "all-reduce-scatter"

# Operations that take no time: new names of existing values, and both ends of background transfers.
FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "partition-id",
        "replica-id",
        "after-all",
        "opt-barrier",
        "iota",
        "copy-start",
        "copy-done",
        "slice-start",
        "slice-done",
        "async-update",
        "async-done",
    }
)


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Cost of one operation of a program, summed over all its runs."""

    name: str
    # product, kernel, vector, or one of COLLECTIVES.
    kind: str
    # Path of the operation in the traced program.
    source: str
    # Number of runs.
    times: float
    # Seconds.
    low: float
    high: float
    flops: float = 0.0
    hbm_bytes: float = 0.0
    # Bytes that each chip sends.
    wire_bytes: float = 0.0
    # Whether this is a collective that other work hides.
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a whole program on one chip."""

    ops: tuple[OpCost, ...]

    def total(self, field: str, *kinds: str, hidden: bool | None = None) -> float:
        """Return the sum of a field over all operations.

        Args:
          field: name of a field of :class:`OpCost`.
          kinds: restrict the sum to operations of these kinds.
          hidden: restrict the sum to operations that are hidden, or to those that are not.
        """
        return sum(
            getattr(op, field)
            for op in self.ops
            if (not kinds or op.kind in kinds) and hidden in (None, op.hidden)
        )

    @property
    def seconds_low(self) -> float:
        """Seconds if collectives in the background are free as long as other work hides them."""
        shown = self.total("low", hidden=False)
        return max(shown, self.total("low", hidden=True))

    @property
    def seconds_high(self) -> float:
        """Seconds if no collective is hidden."""
        return self.total("high")

    @property
    def collectives(self) -> dict[str, dict[str, float]]:
        """Runs, bytes that each chip sends, seconds (low, high) and the share of hidden bytes, by kind."""
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
        """Return the operations with the longest high ends."""
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
    """Add up the costs of a program.

    Args:
      module: from :func:`fam_jax.plan.hlo.parse`.
      chip: the chip that the program was compiled for.
      devices: the devices in the order of the mesh. A program without collectives needs none.
      kernels: seconds (low, high) of one run of each Pallas kernel, by a regular expression that matches the kernel's
        path in the traced program, or its name.
      loops: as in :meth:`fam_jax.plan.hlo.Module.walk`.
      shares: as in :meth:`fam_jax.plan.hlo.Module.walk`.

    Raises:
      ValueError: the time of a kernel is missing, or a loop or collective is of an unknown form.
    """
    counter = _Counter(module, chip, devices, kernels or {})
    costs = []
    counted: set[tuple[int, str | None]] = set()
    for op, computation, times in module.walk(loops=loops, shares=shares):
        if op.opcode in FREE or op.opcode.endswith("-done"):
            continue
        collective, inner, hidden = _collective(module, op, computation)
        channel = (id(computation), collective.attribute(r"channel_id=(\d+)")) if collective else (0, None)
        # A collective that is split over several fusions appears in each of them, with the same channel.
        if collective is not None and not (hidden and channel in counted):
            counted.add(channel)
            scatter = op.opcode == "fusion" and not hidden
            kind = "reduce-scatter" if scatter else collective.opcode.removesuffix("-start")
            costs.append(counter.collective(collective, kind, inner, times, hidden=hidden))
            if op is collective or scatter:
                continue
        cost = counter.compute(op, computation, times)
        if cost is not None:
            costs.append(cost)
    return Estimate(tuple(costs))


def _collective(module: Module, op: Op, computation: Computation) -> tuple[Op | None, Computation, bool]:
    """Return the collective in `op`, if any, its computation, and whether it runs in the background.

    A collective is an operation of its own, or part of a fusion that does other work meanwhile.
    """
    if op.opcode.removesuffix("-start") in COLLECTIVES:
        return op, computation, op.opcode.endswith("-start")
    if op.opcode == "fusion":
        fused = module.computations[op.called[0]]
        for inner in fused.values():
            if inner.opcode.removesuffix("-start") in COLLECTIVES:
                return inner, fused, not op.called[0].startswith(SCATTER)
    return None, computation, False


@dataclasses.dataclass(frozen=True)
class _Counter:
    """Costs of single operations of a program; the fields are arguments of :func:`estimate`."""

    module: Module
    chip: Chip
    devices: Sequence[jax.Device]
    kernels: Mapping[str, tuple[float, float]]

    def collective(
        self, op: Op, kind: str, computation: Computation, times: float, *, hidden: bool
    ) -> OpCost:
        """Return the cost of a collective in `computation` that runs `times` times."""
        group = replica_group(op)
        count = max(len(group), 1)
        whole = max(
            sum(array.bytes for array in op.results) if not op.opcode.endswith("-start") else 0,
            max((array.bytes for array in op.results), default=0),
            sum(
                computation[name].result_bytes(hbm_only=False) for name in op.operands if name in computation
            ),
        )
        share = (count - 1) / count
        sent = times * whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        slowest = sent / self.chip.ring_bandwidth if count > 1 else 0.0
        rings = 1
        if kind != "collective-permute":
            rings = spanned_axes([self.devices[i] for i in group if self.devices])
        return OpCost(
            op.name, kind, op.source, times, slowest / rings, slowest, wire_bytes=sent, hidden=hidden
        )

    def compute(self, op: Op, computation: Computation, times: float) -> OpCost | None:
        """Return the cost of an operation that is not a collective; None if it takes no time."""
        modelled = _cycles(op, "window_config") / self.chip.clock
        profiled = _cycles(op, "bundle_analysis_data") / self.chip.clock
        traffic = hbm_bytes(self.module, op, computation)
        if op.opcode == "custom-call":
            if 'custom_call_target="tpu_custom_call"' in op.attributes:
                return self._kernel(op, times, traffic)
            # Other custom calls are annotations and allocations. Only those that do work have a figure.
            seconds = times * modelled
            return OpCost(op.name, "vector", op.source, times, seconds, seconds) if modelled else None
        flops = 0
        if op.opcode == "fusion":
            flops = self.module.flops(op.called[0])
        elif op.opcode in ("convolution", "dot"):
            flops = product_flops(op, computation)
        low = max(flops / self.chip.flops / PEAK_SHARE, traffic / self.chip.hbm_bandwidth, profiled)
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

    def _kernel(self, op: Op, times: float, traffic: int) -> OpCost:
        place = f"{op.source} {op.name}"
        pattern = next((pattern for pattern in self.kernels if re.search(pattern, place)), None)
        if pattern is None:
            raise ValueError(f"{op.name}: the time of this kernel is missing")
        if READS_BLOCKS in op.name:
            traffic = 0
        low, high = (
            times * max(seconds, traffic / self.chip.hbm_bandwidth) for seconds in self.kernels[pattern]
        )
        return OpCost(op.name, "kernel", op.source, times, low, high, hbm_bytes=times * traffic)


def spanned_axes(devices: Sequence[jax.Device]) -> int:
    """Return along how many axes of the torus the devices differ, at least 1."""
    if len(devices) < 2:
        return 1
    coordinates = np.array([device.coords for device in devices])
    return max(1, int((coordinates != coordinates[0]).any(axis=0).sum()))


def _cycles(op: Op, section: str) -> int:
    """Return the compiler's cycles from a section of the backend's configuration; 0 if unknown."""
    found = op.attribute(rf'"{section}":\{{[^}}]*?"estimated_cycles":"(\d+)"')
    cycles = int(found or 0)
    return cycles if cycles < 2**60 else 0  # the largest integer means "unknown"


def hbm_bytes(module: Module, op: Op, computation: Computation) -> int:
    """Return the HBM traffic of one run.

    Operands that are sliced count the slice only, and operands that are updated in place the update only.
    """
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
    """Return the bytes of a fusion's parameter that its users read; infinity if they read all of it."""
    total = 0.0
    for user, place in _users(fused)[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            total += user.result_bytes(hbm_only=False)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        elif user.opcode == "tuple" or user.opcode in COLLECTIVES:
            continue  # passed through, or counted as the collective's traffic
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
    """Return the bytes that a fusion writes: of an operand that it updates in place, only the update."""
    (root,) = (x for x in fused.values() if x.is_root)
    leaves = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for leaf, result in zip(leaves, op.results, strict=False):
        size = result.bytes if result.in_hbm else 0
        while leaf.opcode == "bitcast" and leaf.operands[0] in fused:
            leaf = fused[leaf.operands[0]]
        if leaf.opcode == "parameter" or leaf.opcode in COLLECTIVES:
            size = 0  # passed through, or counted as the collective's traffic
        elif leaf.opcode == "dynamic-update-slice" and (update := fused.get(leaf.operands[1])):
            size = min(size, update.result_bytes(hbm_only=False))
        total += size
    return total
