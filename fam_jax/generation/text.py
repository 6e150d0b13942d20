"""A trained model with its vocabulary, which reads and generates text.

    model = TextModel.restore("runs/book")
    with open("book.txt", "rb") as book:
        state = model.read(book)
    print(model.generate(model.read("Who did it?", state), max_tokens=32).text)

A state is a value: it can be continued in any number of ways.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from fam_jax.checkpoint import end_ids, vocabulary_digest
from fam_jax.config import Config, UserError
from fam_jax.data.vocabulary import bos_ids, check_ids, check_vocabulary_size, task_digest
from fam_jax.generation.endings import Endings, TextWriter
from fam_jax.generation.sampling import GREEDY, Sampling, check_seed
from fam_jax.generation.state_file import load_state, save_state
from fam_jax.generation.streaming import NotFiniteError, Streamer
from fam_jax.generation.tokenize import check_unicode, encode_pieces, read_text
from fam_jax.generation.turn import Turn, user_turn
from fam_jax.memories.window_cache import ShownByShape
from fam_jax.model import StreamState
from fam_jax.model.memory_health import MemoryHealth, compare
from fam_jax.restore import load_model, load_task_vocabulary

# A reading of at least so many blocks looks at the memory in the end. That reads one block more.
LOOK_BLOCKS = 64
# Tokens to generate before the text is searched for stop strings.
TOKENS_PER_CALL = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TextState(ShownByShape):
    """The state of one stream of text: a value that can be continued in several ways."""

    streams: StreamState
    # (1, V) logits of the next token; None: unknown, as the state comes from a file.
    logits: jax.Array | None

    @property
    def tokens_read(self) -> int:
        """Return the tokens of the whole stream, generated ones included."""
        return int(self.streams.tokens_read[0])


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result of :meth:`TextModel.generate`."""

    # Without the stop string that ended it.
    text: str
    # Tokens generated, those of the stop string included.
    tokens: int
    # "length", "end" (an end token) or the stop string.
    ended_by: str
    # After all of these tokens.
    state: TextState


class TextModel:
    """A model that reads and writes text through a state of constant size."""

    def __init__(
        self,
        config: Config,
        params: dict[str, Any],
        vocabulary: Any,
        *,
        end_ids: Iterable[int] = (),
        step: int | None = None,
    ):
        """Create a model that ends a text at the vocabulary's end token.

        Args:
          config: of the run.
          params: with any LoRA merged.
          vocabulary: of the run's data task; see :func:`fam_jax.data.build.task_vocabulary`.
          end_ids: more tokens that end a text.
          step: the saved step that the parameters come from.

        Raises:
          UserError: the parameters do not fit the model, the vocabulary is larger than the model's, or it has no start
            token although config.data.add_bos asks for one.
        """
        check_vocabulary_size(vocabulary, config.model, config.data)
        self.config, self.vocabulary, self.step = config, vocabulary, step
        self.streamer = Streamer(config.model, params)
        self._begin = bos_ids(vocabulary, config.data)
        self._warned_of_begin = False
        eos = vocabulary.eos_id
        self.end_ids = sorted({*end_ids} | ({eos} if eos is not None and eos >= 0 else set()))

    @classmethod
    def restore(
        cls,
        folder: str | os.PathLike[str],
        step: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        *,
        imports: Sequence[str] = (),
    ) -> "TextModel":
        """Load the model of a run, with the vocabulary of its data task and the end tokens of an imported base.

        Arguments and errors are those of :func:`load_model`.
        """
        config, params, step = load_model(folder, step, mesh, imports=imports)
        vocabulary = load_task_vocabulary(config, folder, step)
        return cls(config, params, vocabulary, end_ids=end_ids(config, folder), step=step)

    def read(
        self,
        source: BinaryIO | str,
        state: TextState | None = None,
        *,
        before: str = "",
        after: str = "",
        chunk_blocks: int = 16,
        on_progress: Callable[[int], None] | None = None,
        on_health: Callable[[MemoryHealth], None] | None = None,
    ) -> TextState:
        """Read a text of any length; host and device memory do not depend on its length.

        Args:
          source: a binary file of UTF-8 text, or the text itself.
          state: to continue; the text is tokenized on its own, and the state stays valid. None: a new stream, which
            begins with the start token if config.data.add_bos is set.
          before: text to read first, such as `turn.before`. With it, or with `after`, special tokens that are spelled
            count as such for every vocabulary.
          after: text to read last, such as `turn.after`.
          chunk_blocks: blocks that go through the model at once.
          on_progress: called with the number of tokens read so far.
          on_health: called with the figures of the memory after a text of :data:`LOOK_BLOCKS` or more. If the memory is
            frozen or not finite, a warning is logged, too.

        Raises:
          UserError: the text is empty or not valid Unicode, or has a token that the model has no embedding for.
          NotFiniteError: the model's logits after the text are NaN or inf.
        """
        name, texts = _texts_of(source)
        encode = self.vocabulary.encode
        if before or after:
            texts, encode = itertools.chain([before], texts, [after]), self.encode_spelled
        size = self.config.model.block_size
        streams = None if state is None else state.streams
        logits, done, latest = None, 0, np.zeros(0, np.int32)
        # The first chunk ends at a block border, so all others are whole blocks.
        first = chunk_blocks * size - (int(state.streams.position.filled[0]) if state is not None else 0)
        pieces = encode_pieces(encode, texts)
        if state is None:
            pieces = self._with_start(pieces)
        for tokens in _chunks(pieces, first, chunk_blocks * size):
            check_ids(tokens, self.vocabulary, self.config.model.vocab_size)
            logits, streams = self.streamer.read([tokens], streams, chunk_blocks=chunk_blocks)
            done += len(tokens)
            latest = np.concatenate([latest, tokens])[-size:]
            if on_progress is not None:
                jax.block_until_ready(logits)
                on_progress(done)
        if streams is None or logits is None:
            raise UserError(f"{name}: holds no tokens; give at least one character to read")
        found = TextState(streams, logits)
        if not jnp.isfinite(logits.max()):
            raise NotFiniteError(f"{name}: {NotFiniteError.reason(found.tokens_read)}")
        if done >= LOOK_BLOCKS * size:
            self._look(streams, latest, on_health)
        return found

    @functools.cached_property
    def turn(self) -> Turn:
        """Return what the chat template puts around the message of a user.

        Raises:
          UserError: the tokenizer has no chat template, or one that does not show the message.
        """
        return user_turn(self.config.data, self.vocabulary)

    @functools.cached_property
    def encode_spelled(self) -> Callable[[str], Sequence[int]]:
        """Return a function from text to ids that takes spelled special tokens for what they spell."""
        # TensorFlow is loaded already, with the vocabulary.
        from fam_jax.data.token_weights import TokenWeights

        tokens = TokenWeights(self.vocabulary)
        return lambda text: tokens.encode([[[(text, 0.0)]]])[0][0].tolist()

    def _look(
        self, streams: StreamState, block: np.ndarray, on_health: Callable[[MemoryHealth], None] | None
    ) -> None:
        """Compare the memory with what it would be after a block more."""
        if not self.config.model.memory.has_state:
            return
        _, after = self.streamer.read([block], streams)
        found = compare(self.config.model, streams, after)
        if found is None:
            return
        for alarm in found.alarms(self.config.model):
            logging.warning("ALARM: %s", alarm)
        if on_health is not None:
            on_health(found)

    def endings(self, stop: Sequence[str]) -> Endings:
        """Return what ends a text: the end tokens of the model, and `stop`.

        Raises:
          UserError: a stop string is empty.
        """
        return Endings(self.vocabulary, self.end_ids, stop)

    def generate(
        self,
        state: TextState,
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Generate text after the state; its memory is updated at every block border.

        Args:
          state: from :meth:`read`.
          max_tokens: largest number of tokens to generate; an end token ends the text too.
          sampling: how tokens are sampled.
          seed: of the sampling.
          stop: strings that end the text and are left out; the text of a special token stands for that token.
          on_text: called with the text as it comes; text that may be the start of a stop string is held back.

        Raises:
          UserError: max_tokens is not positive, the seed is out of range, a stop string is empty, or the state comes
            from a file and nothing was read since.
          NotFiniteError: the model's logits are NaN or inf.
        """
        endings, key = self.endings(stop), jax.random.key(check_seed(seed))
        if state.logits is None:
            raise UserError("a loaded memory does not say what comes next; read a question or a prompt first")
        writer = TextWriter(self.vocabulary.decode, endings, on_text)
        logits, streams, done = state.logits, state.streams, 0
        while True:
            out = self.streamer.generate(
                logits,
                streams,
                max_tokens=min(TOKENS_PER_CALL, max_tokens - done),
                sampling=sampling,
                key=jax.random.fold_in(key, done)[None],
                stop_tokens=endings.tokens,
                tokens_per_call=TOKENS_PER_CALL,
            )
            tokens = out.tokens[0, : out.lengths[0]].tolist()
            taken = writer.add(tokens, stopped=bool(out.stopped[0]))
            done += taken
            if taken < len(tokens):  # the others come after a stop string: read again without them
                logits, streams = self.streamer.read([np.asarray(tokens[:taken])], streams)
            else:
                logits, streams = out.logits, out.state
            if writer.ended_by is not None or done >= max_tokens:
                text = writer.finish()
                assert writer.ended_by is not None
                return Completion(text, done, writer.ended_by, TextState(streams, logits))

    def save(self, path: str | os.PathLike[str], state: TextState) -> None:
        """Write `state` to a file; see :func:`save_state`."""
        save_state(path, state.streams, self.config.model, self.streamer.params, self._vocabulary_digest())

    def load(self, path: str | os.PathLike[str]) -> TextState:
        """Read a state of this model from a file; see :func:`load_state`.

        Raises:
          StateFileError: the file is missing or damaged, or belongs to another model.
          UserError: it holds several streams.
        """
        streams = load_state(path, self.config.model, self.streamer.params, self._vocabulary_digest())
        if streams.batch_size != 1:
            raise UserError(
                f"{path}: holds {streams.batch_size} streams instead of one; choose one with StreamState.select([row]) "
                "before saving"
            )
        return TextState(streams, None)

    def _vocabulary_digest(self) -> str:
        named = vocabulary_digest(dataclasses.asdict(self.config))
        return named or task_digest(self.vocabulary, self.config.data)

    def _with_start(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield the pieces of a new stream: the start token, if any, before the first token; nothing for no tokens."""
        begin = self._begin
        for piece in pieces:
            if piece and begin and piece[0] == begin[0] and not self._warned_of_begin:
                self._warned_of_begin = True
                logging.warning(
                    "the text begins with the start token, which every new stream gets anyway: the model reads it "
                    "twice; leave it out"
                )
            yield [*begin, *piece] if piece else piece
            begin = [] if piece else begin


def _texts_of(source: BinaryIO | str) -> tuple[str, Iterator[str]]:
    """Return the name of a source, for messages, and its text in parts."""
    if isinstance(source, str):
        check_unicode(source, "the text")
        return "the text", iter([source])
    name = str(getattr(source, "name", "the text"))
    return name, iter(read_text(source, name))


def _chunks(pieces: Iterable[list[int]], first: int, size: int) -> Iterator[np.ndarray]:
    """Yield arrays of `size` ids; the first has `first`, the last what is left."""
    held: list[int] = []
    wanted = first
    for piece in pieces:
        held += piece
        begin = 0
        while len(held) - begin >= wanted:
            yield np.asarray(held[begin : begin + wanted], np.int32)
            begin, wanted = begin + wanted, size
        held = held[begin:]
    if held:
        yield np.asarray(held, np.int32)
