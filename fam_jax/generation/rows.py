"""Continuous batching: streams generate together, and a row whose stream has ended is given to another one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.generation.sampling import Sampling
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState


class RowTokens(NamedTuple):
    """The tokens that a row generated in one call."""

    row: int
    tokens: list[int]
    # The last token is a stop token.
    stopped: bool
    # The stream has its largest number of tokens.
    complete: bool
    # False: the logits of the next token are not finite, so the stream cannot go on.
    finite: bool


class Rows:
    """The rows of a batch. What a row generates depends on its own stream and key, not on the other rows."""

    def __init__(
        self,
        streamer: Streamer,
        count: int,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        tokens_per_call: int = 16,
    ):
        """Create `count` empty rows.

        Args:
          streamer: the model.
          count: streams that generate together.
          max_tokens: tokens to generate in each stream.
          sampling: how tokens are sampled.
          stop_tokens: ids that end a stream.
          tokens_per_call: tokens after which rows that have ended can be refilled.
        """
        self._params, self._calls = streamer.params, streamer.calls(count)
        self._state = streamer.start(count)
        self._logits: jax.Array | None = None
        self._keys = jax.random.split(jax.random.key(0), count)
        self._generated = np.zeros(count, np.int32)
        self._busy = np.zeros(count, bool)
        self._max_tokens, self._width = min(max_tokens, np.iinfo(np.int32).max), tokens_per_call
        self._sampling, self._stops = sampling, np.asarray([*stop_tokens], np.int32)

    @property
    def free(self) -> list[int]:
        """Return the rows without a stream."""
        return np.flatnonzero(~self._busy).tolist()

    def fill(self, row: int, stream: StreamState, logits: jax.Array, key: jax.Array) -> None:
        """Give a free row to a stream.

        Args:
          row: from :attr:`free`.
          stream: a state of one stream; it stays valid.
          logits: (1, V) of its next token.
          key: typed PRNG key; token t of the stream is sampled with `fold_in(key, t)`.
        """
        if self._logits is None:
            self._logits = jnp.zeros((len(self._busy), logits.shape[1]), logits.dtype)
        self._logits, self._state = self._calls.replace_row(
            state=self._state, logits=self._logits, row=np.int32(row), stream=stream, its_logits=logits
        )
        self._keys = self._keys.at[row].set(key)
        self._generated[row], self._busy[row] = 0, True

    def release(self, row: int) -> None:
        """Take a row from its stream, which has ended."""
        self._busy[row] = False

    def generate(self) -> list[RowTokens]:
        """Generate up to `tokens_per_call` tokens in every row that has a stream."""
        out: Any
        out, self._state = self._calls.decode(
            self._params,
            state=self._state,
            logits=self._logits,
            stopped=~self._busy,
            keys=self._keys,
            # Copies: the call may read them after they are counted up here.
            begin=self._generated.copy(),
            limits=self._max_tokens - self._generated,
            stop_tokens=self._stops,
            sampling=self._sampling,
            width=self._width,
        )
        self._logits = out.logits
        tokens, counts, stopped, finite = map(np.asarray, (out.tokens, out.counts, out.stopped, out.finite))
        self._generated += counts
        return [
            RowTokens(
                row,
                tokens[row, : counts[row]].tolist(),
                bool(stopped[row]),
                bool(self._generated[row] >= self._max_tokens),
                bool(finite[row]),
            )
            for row in np.flatnonzero(self._busy).tolist()
        ]
