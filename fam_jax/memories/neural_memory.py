"""A memory that learns while it reads: an MLP whose weights take a gradient step at every token (Titans, section 3).

The weights W and their momentum S follow, for each weight matrix and each token t,

    S_t = eta_t S_{t-1} - theta_t gradient_t
    W_t = (1 - alpha_t) W_{t-1} + S_t

where gradient_t is that of |MLP(k_t) - v_t|^2 at the weights that the last chunk of tokens left. A matrix multiplies
from the right, so gradient_t = a_t d_t, the outer product of the matrix's input a_t and of the gradient d_t of its
output. Both recurrences are linear, hence p W_t is a linear attention of p to the inputs of all tokens since the start:

    p W_t = A_t p W_0 + c_t p S_0 - sum over i <= t of G_ti theta_i (p . a_i) d_i

with A_t = prod (1 - alpha_i) over i <= t, G_ti = sum over i <= j <= t of prod (1 - alpha) over (j, t] times prod eta
over (i, j], and c_t the same with the momentum at the start in place of row i. No token has weights of its own.

Letters: B streams, C tokens since the start, W tokens that read, h heads, i and o widths of a matrix's input and
output. All products are computed in the precision of the arrays, which should be float32 or wider.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ceil_div

_einsum = functools.partial(jnp.einsum, precision="highest")

Arrays = tuple[jax.Array, ...]


class FastWeights(NamedTuple):
    """The weights W of an MLP and their momentum S: for each matrix (B, h, i, o)."""

    weights: Arrays
    momentum: Arrays


class Rates(NamedTuple):
    """How a token changes the weights, each (B, C, h)."""

    # theta
    step: jax.Array
    # log eta
    log_momentum: jax.Array
    # log (1 - alpha)
    log_keep: jax.Array


class Rows(NamedTuple):
    """What tokens write: for each matrix its inputs (B, C, h, i) and the gradients (B, C, h, o) of its outputs."""

    inputs: Arrays
    gradients: Arrays
    rates: Rates


class Coefficients(NamedTuple):
    """The coefficients of W weights, for tokens that read: see the formula of this module."""

    # (B, h, W) A_t, of the weights at the start.
    weights: jax.Array
    # (B, h, W) c_t, of the momentum at the start.
    momentum: jax.Array
    # (B, h, W, C) G_ti theta_i, of each row.
    rows: jax.Array


class Matrix(NamedTuple):
    """A weight matrix as two functions: of (B, W, h, i), and of (B, W, h, o) for the transposed matrix."""

    forward: Callable[[jax.Array], jax.Array]
    transposed: Callable[[jax.Array], jax.Array]


def widths_of(depth: int, width: int, hidden: int) -> tuple[int, ...]:
    """Return the widths of the activations of an MLP with `depth` matrices, from its input to its output."""
    return (width, *[hidden] * (depth - 1), width)


def pack(matrices: Sequence[jax.Array]) -> jax.Array:
    """Return matrices (B, h, i, o) side by side in one array (B, h, P)."""
    return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in matrices], axis=-1)


def unpack(packed: jax.Array, widths: Sequence[int]) -> Arrays:
    """Return the matrices (B, h, i, o) of :func:`pack`."""
    shapes = [*itertools.pairwise(widths)]
    ends = np.cumsum([i * o for i, o in shapes])
    parts = jnp.split(packed, ends[:-1], axis=-1)
    return tuple(x.reshape(*x.shape[:2], *shape) for x, shape in zip(parts, shapes, strict=True))


def explicit(weights: Arrays) -> list[Matrix]:
    """Return matrices (B, h, i, o) as functions."""

    def matrix(w: jax.Array) -> Matrix:
        return Matrix(lambda p: _einsum("bwhi,bhio->bwho", p, w), lambda p: _einsum("bwho,bhio->bwhi", p, w))

    return [matrix(w) for w in weights]


def implicit(memory: FastWeights, rows: Rows, coefficients: Coefficients) -> list[Matrix]:
    """Return the matrices that rows have made of the weights, as functions that never form them.

    Args:
      memory: the weights at the start.
      rows: what C tokens have written since.
      coefficients: those of each token that reads, or of one weight (W = 1) for all of them.
    """
    at_start = [explicit(memory.weights), explicit(memory.momentum)]
    kept, pushed = (
        x.swapaxes(1, 2)[..., None] for x in (coefficients.weights, coefficients.momentum)
    )  # (B, W, h, 1)

    def written(p: jax.Array, asked: jax.Array, answered: jax.Array) -> jax.Array:
        scores = _einsum("bwhx,bchx->bhwc", p, asked) * coefficients.rows
        return _einsum("bhwc,bchy->bwhy", scores, answered)

    def matrix(w: Matrix, s: Matrix, inputs: jax.Array, gradients: jax.Array) -> Matrix:
        def forward(p: jax.Array) -> jax.Array:
            return kept * w.forward(p) + pushed * s.forward(p) - written(p, inputs, gradients)

        def transposed(p: jax.Array) -> jax.Array:
            return kept * w.transposed(p) + pushed * s.transposed(p) - written(p, gradients, inputs)

        return Matrix(forward, transposed)

    return [matrix(*each) for each in zip(at_start[0], at_start[1], rows.inputs, rows.gradients, strict=True)]


def retrieve(matrices: Sequence[Matrix], queries: jax.Array) -> jax.Array:
    """Return the output (B, W, h, d) of the MLP for queries (B, W, h, d)."""
    x = matrices[0].forward(queries)
    for matrix in matrices[1:]:
        x = matrix.forward(jax.nn.silu(x))
    return x


def gradients_of(matrices: Sequence[Matrix], keys: jax.Array, values: jax.Array) -> tuple[Arrays, Arrays]:
    """Return each matrix's input, and the gradient of |MLP(k) - v|^2 with respect to its output.

    Args:
      matrices: the MLP.
      keys: (B, W, h, d).
      values: (B, W, h, d).
    """
    inputs, outputs = [keys], [matrices[0].forward(keys)]
    for matrix in matrices[1:]:
        inputs.append(jax.nn.silu(outputs[-1]))
        outputs.append(matrix.forward(inputs[-1]))
    gradients = [2 * (outputs.pop() - values)]
    for matrix in matrices[:0:-1]:
        gradients.append(matrix.transposed(gradients[-1]) * _slope_of_silu(outputs.pop()))
    return tuple(inputs), tuple(gradients[::-1])


def _slope_of_silu(x: jax.Array) -> jax.Array:
    gate = jax.nn.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def products(logs: jax.Array, counts: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return products of factors over the rows from each row to the last one that counts.

    Sums of logarithms of exactly these rows are used: differences of sums would lose digits.

    Args:
      logs: (B, C, h) logarithms of the factors.
      counts: (B or 1, W) how many rows count: the first ones.

    Returns:
      (B, h, W, C) for each row the product over the rows after it, 0 for rows that do not count; and the product over
      all rows that count, (B, h, W).
    """
    counted = np.arange(logs.shape[1]) < counts[:, None, :, None]  # (B or 1, 1, W, C)
    masked = jnp.where(counted, logs.swapaxes(1, 2)[:, :, None], 0)
    sums = jax.lax.cumsum(masked, axis=3, reverse=True)
    after = jnp.concatenate([sums[..., 1:], jnp.zeros_like(sums[..., :1])], axis=-1)
    return jnp.where(counted, jnp.exp(after), 0), jnp.exp(sums[..., 0])


def coefficients_of(rates: Rates, counts: jax.Array | np.ndarray) -> Coefficients:
    """Return the coefficients of the weights after the first `counts` (B or 1, W) of C rows."""
    kept, of_weights = products(rates.log_keep, counts)
    # For each row j the products of eta over (i, j], and from the start.
    since, of_start = products(rates.log_momentum, np.arange(1, rates.step.shape[1] + 1)[None])
    return Coefficients(
        weights=of_weights,
        momentum=_einsum("bhwj,bhj->bhw", kept, of_start),
        rows=_einsum("bhwj,bhji->bhwi", kept, since) * rates.step.swapaxes(1, 2)[:, :, None],
    )


def absorb(memory: FastWeights, rows: Rows) -> FastWeights:
    """Return the weights and their momentum after all C rows."""
    every = np.full((1, 1), rows.rates.step.shape[1])
    coefficients = coefficients_of(rows.rates, every)
    since, of_start = products(rows.rates.log_momentum, every)
    of_rows = since[:, :, 0] * rows.rates.step.swapaxes(1, 2)  # (B, h, C)

    def written(factors: jax.Array, inputs: jax.Array, gradients: jax.Array) -> jax.Array:
        return _einsum("bchi,bcho->bhio", factors.swapaxes(1, 2)[..., None] * inputs, gradients)

    weights, momentum = [], []
    for w, s, inputs, gradients in zip(*memory, rows.inputs, rows.gradients, strict=True):
        kept = coefficients.weights[..., None] * w + coefficients.momentum[..., None] * s
        weights.append(kept - written(coefficients.rows[:, :, 0], inputs, gradients))
        momentum.append(of_start[..., None] * s - written(of_rows, inputs, gradients))
    return FastWeights(tuple(weights), tuple(momentum))


class Tokens(NamedTuple):
    """What the tokens of a text give to the memory."""

    # (B, T, h, d); None if they do not read it.
    queries: jax.Array | None
    # (B, T, h, d)
    keys: jax.Array
    values: jax.Array
    rates: Rates


def read_chunks(memory: FastWeights, tokens: Tokens, chunk: int) -> tuple[FastWeights, jax.Array | None]:
    """Read tokens (B, T, ...), chunk by chunk from a border on; T is a multiple of `chunk`.

    Returns:
      The memory after them, and what each token's query gets from the weights that the token itself has changed,
      (B, T, h, d).
    """
    batch, length = tokens.keys.shape[:2]
    count = length // chunk

    def body(memory: FastWeights, part: Tokens) -> tuple[FastWeights, jax.Array | None]:
        rows = Rows(*gradients_of(explicit(memory.weights), part.keys, part.values), part.rates)
        out = None
        if part.queries is not None:
            coefficients = coefficients_of(part.rates, np.arange(1, chunk + 1)[None])
            out = retrieve(implicit(memory, rows, coefficients), part.queries)
        return absorb(memory, rows), out

    chunks = jax.tree.map(lambda x: x.reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1), tokens)
    memory, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), memory, chunks)
    return memory, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:]), out)


def write_piece(memory: FastWeights, rows: Rows, tokens: Tokens, filled: jax.Array, chunk: int) -> Rows:
    """Append tokens (B, W, ...) to the rows of a block that begins at a border.

    Streams may be at different places in their blocks. The gradients of a chunk's tokens need the rows of all chunks
    before it, so chunks are written one after the other.

    Args:
      memory: the weights at the start of the block.
      rows: (B, C, ...) of the block; those from `filled` on are unused.
      tokens: the tokens.
      filled: (B,) rows that each stream has.
      chunk: tokens of a chunk; it divides C.

    Returns:
      The rows (B, C, ...) of the block. Tokens beyond the end of the block are left out.
    """
    batch, width = tokens.keys.shape[:2]
    rates = jax.tree.map(
        lambda x, new: _put(x, new, filled[:, None] + np.arange(width)), rows.rates, tokens.rates
    )
    most = 1 + ceil_div(width - 1, chunk)  # chunks that the tokens may touch
    first = filled // chunk * chunk
    coefficients = coefficients_of(rates, first[:, None] + chunk * np.arange(most))

    def body(written: tuple[Arrays, Arrays], number: jax.Array) -> tuple[tuple[Arrays, Arrays], None]:
        slots = (first + chunk * number)[:, None] + np.arange(chunk)
        place = slots - filled[:, None]
        new = (place >= 0) & (place < width)
        at_border = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, axis=2), coefficients)
        keys, values = (
            x[np.arange(batch)[:, None], jnp.clip(place, 0, width - 1)] for x in (tokens.keys, tokens.values)
        )
        matrices = implicit(memory, Rows(*written, rates), at_border)
        # Rows to leave out get a slot beyond the end of the block.
        slots = jnp.where(new, slots, rates.step.shape[1])
        found = gradients_of(matrices, keys, values)
        return jax.tree.map(lambda x, y: _put(x, y, slots), written, found), None

    written, _ = jax.lax.scan(body, (rows.inputs, rows.gradients), jnp.arange(most))
    return Rows(*written, rates)


def _put(rows: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Return rows (B, C, ...) with new ones (B, W, ...) in `slots` (B, W); slots beyond the end are left out."""
    return rows.at[np.arange(len(rows))[:, None], slots].set(new, mode="drop")
