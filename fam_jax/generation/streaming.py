"""Read any number of tokens through a state of constant size, and generate from it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig, UserError
from fam_jax.generation.compiled import (
    Calls,
    compiled_calls,
    mesh_of,
    rows_sharding,
    state_sharding,
    structure,
)
from fam_jax.generation.sampling import GREEDY, Sampling
from fam_jax.model import StreamState, from_dict, to_dict

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Generated:
    """The result of :meth:`Streamer.generate`. To go on, pass `logits` and `state` to it again."""

    # (B, n) int32; each row's first `lengths` are generated, the others 0.
    tokens: np.ndarray
    # (B,) int32; a stop token counts.
    lengths: np.ndarray
    # (B, n) log probabilities under the model itself, before temperature and filters.
    logprobs: np.ndarray
    # (B,) bool: ended by a stop token, not by max_tokens.
    stopped: np.ndarray
    # (B, V) logits of each row's next token.
    logits: jax.Array
    # After what was read before and all generated tokens.
    state: StreamState


class NotFiniteError(UserError):
    """The model's logits are NaN or inf: its weights or its activations are not finite."""

    @staticmethod
    def reason(tokens_read: int) -> str:
        """Return the message for a stream of so many tokens."""
        return (
            f"the model's logits are not finite (NaN or inf) after {tokens_read:,} tokens; use another step of the "
            "run, or float32 activations (config.model.dtype)"
        )


class Streamer:
    """A model that reads and writes streams. A state passed in stays valid, so it can be continued in several ways.

    Parameters that are spread over a mesh of `fam_jax.sharding` stay where they are, and batches are spread over the
    mesh too. All instances of one config share compiled programs.
    """

    def __init__(self, config: ModelConfig, params: Any):
        """Take parameters as the nested dict that checkpoints hold, or as `nnx.State`.

        Raises:
          UserError: the parameters do not fit a model of this config.
        """
        values = to_dict(params) if isinstance(params, nnx.State) else params
        try:
            from_dict(structure(config)[1], values)
        except ValueError as error:
            raise UserError(f"{error}; load them with the config that they were trained with") from error
        self.config = config
        self.params = jax.tree.map(jnp.asarray, values)
        self.mesh = mesh_of(self.params)

    def start(self, batch_size: int) -> StreamState:
        """Return the state of `batch_size` streams that have read nothing."""
        return self.calls(batch_size).start(self.params)

    def read(
        self,
        prompts: Sequence[np.ndarray],
        state: StreamState | None = None,
        *,
        chunk_blocks: int = 16,
        narrow: bool = False,
        on_progress: Progress | None = None,
    ) -> tuple[jax.Array, StreamState]:
        """Read a prompt per row; they may differ in length. Device memory does not depend on the lengths.

        Args:
          prompts: B arrays (tokens,) of token ids.
          state: of B streams to continue; None starts new ones.
          chunk_blocks: blocks that go through the model at once while all rows have that many. Sets speed and device
            memory, not the result.
          narrow: whether pieces of a block cost what the longest of them has, rounded up to a power of two and at least
            an eighth of a block, in place of a block. For many short prompts; it compiles more programs.
          on_progress: called with the number of tokens read and to read, in all rows together.

        Returns:
          Logits (B, V) of the token that follows each prompt, and the state.

        Raises:
          UserError: a prompt is empty or has ids outside the vocabulary; the state has another number of streams.
        """
        if chunk_blocks < 1:
            raise UserError(f"chunk_blocks: must be at least 1, got {chunk_blocks}")
        rows = self._checked(prompts, "prompt")
        state = self.start(len(rows)) if state is None else self._copied(state, len(rows))
        calls = self.calls(len(rows))
        last = jnp.zeros((len(rows), self.config.model_dim), self.config.dtype)
        lengths = np.array([len(row) for row in rows])
        done = np.zeros_like(lengths)
        filled = np.asarray(state.position.filled)
        for counts, aligned in plan_reads(filled, lengths, self.config.block_size, chunk_blocks):
            width = max(counts.max(), self.config.block_size)
            if narrow and not aligned:
                width = min(max(1 << int(counts.max() - 1).bit_length(), width // 8), width)
            tokens = self._placed(_window(rows, done, counts, width))
            if aligned:
                last, state = calls.read_blocks(self.params, state=state, tokens=tokens)
            else:
                last, state = calls.read_piece(
                    self.params, state=state, tokens=tokens, counts=counts.astype(np.int32), last=last
                )
            done += counts
            if on_progress is not None:
                last.block_until_ready()  # calls are queued: progress would run ahead of them
                on_progress(int(done.sum()), int(lengths.sum()))
        return calls.logits(self.params, last), state

    def generate(
        self,
        logits: jax.Array,
        state: StreamState,
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        key: jax.Array | None = None,
        stop_tokens: Sequence[int] = (),
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
        tokens_per_call: int = 16,
    ) -> Generated:
        """Generate token by token. Each token is read into the state; after a stop token the row rests.

        Args:
          logits: (B, V) of the next token, from :meth:`read` or an earlier generation.
          state: of the same B streams.
          max_tokens: tokens to generate in each row.
          sampling: how tokens are sampled.
          key: typed PRNG keys (B,), or one from which row b gets `fold_in(key, b)`; needed unless greedy. Token t of
            this call is sampled with `fold_in(key of its row, t)`.
          stop_tokens: ids that end a row.
          on_tokens: called with the tokens (B, n) since the last call and their number (B,) in each row.
          tokens_per_call: tokens between these calls; they leave the device together.

        Raises:
          UserError: max_tokens is not positive, or there is no key to sample with.
          NotFiniteError: the model's logits are NaN or inf, so no token can be chosen.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: must be at least 1, got {max_tokens}")
        batch, stops = logits.shape[0], np.asarray([*stop_tokens], np.int32)
        calls, keys, state = self.calls(batch), _row_keys(key, batch, sampling), self._copied(state, batch)
        stopped: Any = np.zeros(batch, bool)
        parts, generated = [], 0
        while generated < max_tokens:
            out, state = calls.decode(
                self.params,
                state=state,
                logits=logits,
                stopped=stopped,
                keys=keys,
                begin=np.full(batch, generated, np.int32),
                limits=np.full(batch, min(max_tokens - generated, tokens_per_call), np.int32),
                stop_tokens=stops,
                sampling=sampling,
                width=tokens_per_call,
            )
            logits, stopped, steps = out.logits, out.stopped, int(out.steps)
            failed = ~np.asarray(out.finite | stopped) & (np.asarray(out.counts) < max_tokens - generated)
            for row in np.flatnonzero(failed):
                raise NotFiniteError(f"row {row}: {NotFiniteError.reason(state.tokens_read[row])}")
            part = [np.asarray(x) for x in (out.tokens[:, :steps], out.logprobs[:, :steps], out.counts)]
            parts.append(part)
            generated += steps
            if on_tokens is not None:
                on_tokens(part[0], part[2])
            if np.asarray(stopped).all():
                break
        return _joined(parts, np.asarray(stopped), logits, state)

    def score(
        self, continuations: Sequence[np.ndarray], logits: jax.Array, state: StreamState
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Score given continuations, each token after the true ones before it (teacher forcing).

        Args:
          continuations: B arrays (tokens,) of token ids.
          logits: (B, V) of the next token, from :meth:`read` or :meth:`generate`.
          state: of the same B streams.

        Returns:
          For each row: the likeliest id in place of each token (int32; TIE if several are equally likely), and the log
          probability of each token.

        Raises:
          UserError: as :meth:`read`.
        """
        rows = self._checked(continuations, "continuation")
        state = self._copied(state, len(rows))
        lengths = np.array([len(row) for row in rows])
        # A power of two: few widths are compiled, whatever the lengths.
        width = min(1 << int(lengths.max() - 1).bit_length(), self.config.block_size)
        likeliest, logprobs = [], []
        for begin in range(0, int(lengths.max()), width):
            counts = np.clip(lengths - begin, 0, width)
            tokens = self._placed(_window(rows, np.full_like(lengths, begin), counts, width))
            out, state = self.calls(len(rows)).score(
                self.params, state=state, logits=logits, tokens=tokens, counts=counts.astype(np.int32)
            )
            logits = out.logits
            likeliest.append(np.asarray(out.likeliest))
            logprobs.append(np.asarray(out.logprobs))
        ids, values = np.concatenate(likeliest, axis=1), np.concatenate(logprobs, axis=1)
        return [(ids[b, :n], values[b, :n]) for b, n in enumerate(lengths)]

    def measure(
        self, inputs: np.ndarray, targets: np.ndarray, state: StreamState, *, tokens_at_once: int = 4096
    ) -> tuple[np.ndarray, np.ndarray, StreamState]:
        """Measure how well each target is predicted from the inputs up to its place, for long texts.

        Args:
          inputs: (B, T) int32, T a multiple of the block size; every stream must stand at a block border.
          targets: (B, T) int32.
          state: of B streams.
          tokens_at_once: tokens in all rows together whose logits exist at one time.

        Returns:
          The likeliest id in place of each target (B, T) int32 (TIE if several are equally likely), the log probability
          of each target (B, T), and the state after the inputs.

        Raises:
          UserError: ids are outside the vocabulary; the state has another number of streams.
          ValueError: the inputs are not whole blocks, or a stream is within one.
        """
        if inputs.shape[1] % self.config.block_size or np.asarray(state.position.filled).any():
            raise ValueError(
                f"inputs: {inputs.shape[1]} tokens are not whole blocks that start at a block border"
            )
        self._checked([*inputs], "input")
        self._checked([*targets], "target")
        rows = len(inputs)
        out, state = self.calls(rows).measure_blocks(
            self.params,
            state=self._copied(state, rows),
            inputs=self._placed(inputs),
            targets=self._placed(targets),
            width=min(max(1, tokens_at_once // rows), inputs.shape[1]),
        )
        return np.asarray(out.likeliest), np.asarray(out.logprobs), state

    def calls(self, rows: int) -> Calls:
        """Return the compiled functions for batches of `rows` rows."""
        return compiled_calls(self.config, self.mesh, rows)

    def _placed(self, tokens: np.ndarray) -> Any:
        return tokens if self.mesh is None else jax.device_put(tokens, rows_sharding(self.mesh, len(tokens)))

    def _copied(self, state: StreamState, rows: int) -> StreamState:
        """Return a copy for the compiled calls to consume."""
        if state.batch_size != rows:
            raise UserError(f"state: holds {state.batch_size} streams, but there are {rows} rows to read")
        state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
        if self.mesh is None:
            return state
        return jax.device_put(state, state_sharding(self.mesh, self.config, rows))

    def _checked(self, texts: Sequence[np.ndarray], kind: str) -> list[np.ndarray]:
        if len(texts) == 0:
            raise UserError(f"{kind}s: there are none; give at least one")
        rows = [np.asarray(text) for text in texts]
        for number, row in enumerate(rows):
            if row.size == 0:
                raise UserError(
                    f"{kind} {number}: is empty; the model needs at least one token, such as a start token"
                )
            if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
                raise UserError(
                    f"{kind} {number}: expected a list of token ids, got {row.dtype} of shape {row.shape}"
                )
            low, high = row.min(), row.max()
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise UserError(
                    f"{kind} {number}: token id {wrong} is outside the model's vocabulary of {self.config.vocab_size}; "
                    "was it tokenized with another vocabulary?"
                )
        return [row.astype(np.int32) for row in rows]


def _row_keys(key: jax.Array | None, rows: int, sampling: Sampling) -> jax.Array:
    """Return keys (B,), from keys (B,), from one key, or for greedy decoding from none."""
    if key is None and sampling.temperature > 0:
        raise UserError("key: sampling at a temperature above 0 needs a random key")
    if key is not None and key.ndim:
        return key
    key = jax.random.key(0) if key is None else key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(rows))


def _joined(
    parts: Sequence[list[np.ndarray]], stopped: np.ndarray, logits: jax.Array, state: StreamState
) -> Generated:
    """Return the result of consecutive calls, each of which gave tokens, log probabilities and counts."""
    tokens, logprobs, counts = zip(*parts, strict=True)
    return Generated(
        tokens=np.concatenate(tokens, axis=1),
        lengths=np.asarray(counts).sum(axis=0, dtype=np.int32),
        logprobs=np.concatenate(logprobs, axis=1),
        stopped=stopped,
        logits=logits,
        state=state,
    )


def plan_reads(
    filled: np.ndarray, lengths: np.ndarray, block_size: int, chunk_blocks: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Divide rows of `lengths` (B,) tokens into calls, for streams with `filled` (B,) tokens in unfinished blocks.

    Yields:
      How many tokens (B,) each row reads next, and whether as whole blocks from a block border. Then all rows read the
      same number: `chunk_blocks` blocks at first, fewer at the end. Other calls read at most a block of tokens.
    """
    lead = -filled % block_size
    whole = int(((lengths - lead) // block_size).min())  # whole blocks that all rows have
    remaining = lengths.copy()
    if whole > 0:
        if lead.any():
            yield lead, False
        left, blocks = whole, chunk_blocks
        while left > 0:
            while blocks > left:
                blocks = max(blocks // 4, 1)  # every size is a program to compile: few sizes
            yield np.full_like(lengths, blocks * block_size), True
            left -= blocks
        remaining -= lead + whole * block_size
    while remaining.any():
        counts = np.minimum(remaining, block_size)
        yield counts, False
        remaining -= counts


def _window(rows: Sequence[np.ndarray], begin: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Return (B, width): each row's `counts` tokens from `begin` on, then zeros."""
    out = np.zeros((len(rows), width), np.int32)
    for b, (row, first, count) in enumerate(zip(rows, begin, counts, strict=True)):
        out[b, :count] = row[first : first + count]
    return out
