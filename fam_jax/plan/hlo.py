"""Parse the text of a compiled program (HLO, as printed by `Compiled.as_text()`): the parts that costs depend on."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Types whose names do not end in their size in bits.
BITS = {"pred": 8, "s4": 4, "u4": 4}

_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](\{[^{}]*\})?")
_OP = re.compile(r"\s+(ROOT )?%([^\s=]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([^\s,{}()]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, shape and memory space of a value."""

    dtype: str
    dims: tuple[int, ...]
    # True if the value is in HBM, False if it is in a core's own memory.
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Size of all elements, without padding of the layout."""
        bits = BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["32"])[0])
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    opcode: str
    # The leaves, if the result is a tuple.
    results: tuple[Array, ...]
    # Names of operations in the same computation.
    operands: tuple[str, ...]
    # The text between the parentheses, and the text after them.
    literal: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that run as part of this operation. Loop conditions are left out."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        listed = tuple(re.findall(r"%([^\s,]+)", branches[1])) if branches else ()
        return listed + tuple(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of a conditional's branches in the order of their index; false before true."""
        return self.called if "branch_computations=" in self.attributes else self.called[::-1]

    @property
    def source(self) -> str:
        """Path of the operation in the traced program."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of `pattern` in the attributes, or None without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def result_bytes(self, *, hbm_only: bool = True) -> int:
        """Return the size of the results."""
        return sum(array.bytes for array in self.results if array.in_hbm or not hbm_only)


Computation = dict[str, Op]

# Conditional -> how often each of its branches runs, per run of the conditional; None if unknown.
Shares = Callable[[Op], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, each with its operations in the order of execution."""

    computations: dict[str, Computation]
    entry: str

    def walk(
        self, *, loops: int | None = None, shares: Shares | None = None
    ) -> Iterator[tuple[Op, Computation, float]]:
        """Yield every operation that runs, its computation, and how often it runs.

        Args:
          loops: trip count of loops whose end depends on data; None raises an error for such loops.
          shares: how often branches of conditionals run. By default, and where unknown, every branch counts once per
            run of its conditional.

        Raises:
          ValueError: the trip count of a loop is unknown.
        """

        def walk(name: str, times: float) -> Iterator[tuple[Op, Computation, float]]:
            computation = self.computations[name]
            for op in computation.values():
                if op.opcode == "while":
                    (body,) = op.called
                    yield from walk(body, times * self.trip_count(op, computation, loops))
                elif op.opcode == "conditional":
                    known = shares(op) if shares else None
                    for branch, share in zip(op.branches, known or [1] * len(op.branches), strict=True):
                        if share:
                            yield from walk(branch, times * share)
                elif op.opcode in ("call", "async-start"):
                    for called in op.called:
                        yield from walk(called, times)
                else:
                    yield op, computation, times

        yield from walk(self.entry, 1)

    def trip_count(self, loop: Op, computation: Computation, otherwise: int | None = None) -> int:
        """Return how often the body of a `while` runs, if the loop compares a counter with a constant.

        Args:
          loop: the `while` operation.
          computation: the computation that contains the loop.
          otherwise: the result for all other loops.

        Raises:
          ValueError: the loop is of another kind, and `otherwise` is None.
        """
        condition = self.computations[loop.attribute(r"condition=%([^\s,]+)") or ""]
        (test,) = (op for op in condition.values() if op.is_root)
        start = computation.get(loop.operands[0])

        def value(name: str) -> int | None:
            """Return the value of a constant, or the start value of an entry of the carry."""
            op = condition[name]
            if op.opcode == "get-tuple-element" and start is not None and start.opcode == "tuple":
                return _constant(computation, start.operands[int(op.attribute(r"index=(\d+)") or 0)])
            return _constant(condition, name)

        if test.opcode == "compare":
            counter, limit = (value(name) for name in test.operands)
            direction = test.attribute(r"direction=(\w+)")
            if limit is not None and direction in ("LT", "LE", "GT", "GE"):
                steps = abs(limit - (counter or 0))
                return steps + 1 if direction in ("LE", "GE") else steps
        if otherwise is None:
            raise ValueError(
                f"{loop.name}: unknown trip count; the loop does not compare a counter with a constant"
            )
        return otherwise

    def flops(self, computation: str) -> int:
        """Return the FLOPs of all matrix products in a fused computation."""
        found = 0
        for op in self.computations[computation].values():
            if op.opcode in ("convolution", "dot"):
                found += product_flops(op, self.computations[computation])
            elif op.opcode == "fusion":
                found += self.flops(op.called[0])
        return found


def parse(text: str) -> Module:
    """Parse the text of one module."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in _whole_lines(text):
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _OP.match(line)):
            current[match[2]] = _parse_op(match[2], bool(match[1]), match[3])
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Yield one line per operation: attributes may contain line breaks."""
    whole = ""
    for line in text.splitlines():
        if line == "}" or _OP.match(line) or line.startswith(("%", "ENTRY ", "HloModule ")):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def _parse_op(name: str, is_root: bool, text: str) -> Op:
    """Parse `type opcode(operands), attributes`; the type may be a tuple of types."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    results = tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), not re.search(r"S\([1-9]", layout or ""))
        for dtype, dims, layout in _ARRAY.findall(kind)
    )
    operands = tuple(re.findall(r"%([^\s,()]+)", inner))
    return Op(name, rest[:opening], results, operands, inner, rest[closing + 1 :], is_root)


def _closing(text: str, opening: int) -> int:
    """Return the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _constant(computation: Computation, name: str) -> int | None:
    op = computation.get(name)
    while op is not None and op.opcode in ("copy", "bitcast", "convert") and op.operands:
        op = computation.get(op.operands[0])
    is_number = op is not None and op.opcode == "constant" and re.fullmatch(r"\s*-?\d+\s*", op.literal)
    return int(op.literal) if op is not None and is_number else None


def product_flops(op: Op, computation: Computation) -> int:
    """Return the FLOPs of a matrix product, which TPU programs write as a convolution.

    They follow from sizes: with batch b and sides m, k, n, the operands and the result have bmk, bkn and bmn elements,
    and the product takes 2 bmkn FLOPs.
    """
    left, right = (computation[name].results[0].dims for name in op.operands[:2])
    out = op.results[0].dims
    batch = 1
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels:
        for axis in filter(str.isdigit, labels[1]):
            if axis in labels[2] and axis in labels[3]:
                sizes = {
                    dims[text.index(axis)]
                    for dims, text in zip((left, right, out), labels.groups(), strict=True)
                }
                batch *= sizes.pop() if len(sizes) == 1 else 1
    listed = re.search(r"lhs_batch_dims=\{([\d,]*)\}", op.attributes)
    if listed:
        batch *= math.prod(left[int(axis)] for axis in filter(None, listed[1].split(",")))
    return 2 * math.isqrt(math.prod(left) * math.prod(right) * math.prod(out) // max(batch, 1))


def replica_group(op: Op) -> list[int]:
    """Return the devices of the first group of a collective, as indices into the mesh.

    Raises:
      ValueError: the notation of the groups is unknown.
    """
    text = op.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [int(device) for device in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _numbers(match[1]), _numbers(match[2])
        devices = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            devices = devices.transpose(_numbers(match[3]))
        return [int(device) for device in devices.reshape(shape)[0]]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        order = np.arange(math.prod(axes.values()))
        if ids := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", match[2]):
            order = order.reshape(_numbers(ids[1]))
            order = order.transpose(_numbers(ids[2])) if ids[2] else order
        grouped = re.findall(r"'([^']+)'", match[3])
        first = tuple(slice(None) if name in grouped else 0 for name in axes)
        return [int(device) for device in order.reshape(tuple(axes.values()))[first].flat]
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return [int(match[1]), int(match[2])]
    raise ValueError(f"{op.name}: replica groups in an unknown notation")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
