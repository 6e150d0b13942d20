"""Truncated backpropagation through time: rows are read in parts, and no gradient passes from one to the part before.

This serves every memory, because a row may be divided into calls at any border without a change of the results. What
does not pass a border is the gradient of the whole state: of the memory and of cached keys and values.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fam_jax.config import TrainConfig, ceil_div
from fam_jax.model.state import StreamState


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Where in a row gradients stop."""

    # k, blocks; 0: nowhere.
    blocks: int = 0
    # chunked: at every k-th border, so a loss reaches 0 to k - 1 blocks back. last: once, before the last k blocks.
    kind: str = "chunked"

    def parts(self, length: int, block_size: int) -> list[int]:
        """Return the numbers of tokens of the parts of a row of `length` tokens that begins at a block border."""
        size = self.blocks * block_size
        if self.kind == "last":
            before = (ceil_div(length, block_size) - self.blocks) * block_size
            return [before, length - before] if self.blocks and before > 0 else [length]
        if not self.blocks or length <= size:
            return [length]
        whole, rest = divmod(length, size)
        return [size] * whole + [rest] * (rest > 0)


FULL = Truncation()  # gradients pass through whole rows


def truncation_of(train: TrainConfig) -> Truncation:
    """Return where gradients stop in a training step."""
    return Truncation(train.bptt_blocks, train.bptt_kind)


def _without_gradient(state: StreamState) -> StreamState:
    """Stop gradients at the state, but not at the auxiliary losses that it has collected."""
    stopped = jax.lax.stop_gradient(state)
    layers = dataclasses.replace(stopped.layers, auxiliary_loss=state.layers.auxiliary_loss)
    return dataclasses.replace(stopped, layers=layers)


# Reads tokens (B, T) from a block border.
Read = Callable[[jax.Array, StreamState], tuple[jax.Array, StreamState]]


def read_in_parts(
    read: Read, tokens: jax.Array, state: StreamState, parts: list[int]
) -> tuple[jax.Array, StreamState]:
    """Read tokens (B, T) part by part, without gradients between the parts; return what one call of `read` returns.

    Args:
      read: reads a part.
      tokens: (B, T), from a block border.
      state: the state before them.
      parts: numbers of tokens, from :meth:`Truncation.parts`: all but the last are multiples of C.
    """
    if len(parts) == 1:
        return read(tokens, state)

    def go_on(state: StreamState, part: jax.Array) -> tuple[StreamState, jax.Array]:
        hidden, state = read(part, _without_gradient(state))
        return state, hidden

    # The first part is read outside of the scan, because its state may have no room for past blocks.
    hidden, state = read(tokens[:, : parts[0]], state)
    outputs, begin = [hidden], parts[0]
    alike = sum(part == parts[0] for part in parts[1:])
    if alike:
        end = begin + alike * parts[0]
        stacked = tokens[:, begin:end].reshape(len(tokens), alike, parts[0]).swapaxes(0, 1)
        state, hidden = jax.lax.scan(go_on, state, stacked)
        outputs.append(hidden.swapaxes(0, 1).reshape(len(tokens), end - begin, -1))
        begin = end
    if begin < tokens.shape[1]:
        state, hidden = go_on(state, tokens[:, begin:])
        outputs.append(hidden)
    return jnp.concatenate(outputs, axis=1), state
