"""A trained model with its vocabulary, which reads and generates text.

    model = TextModel.restore("runs/book")
    with open("book.txt", "rb") as book:
        state = model.read(book)
    print(model.generate(model.read("Who did it?", state), max_tokens=32).text)

A state is a value: it can be continued in any number of ways.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from fam_jax.checkpoint import vocabulary_digest
from fam_jax.config import Config, UserError
from fam_jax.data.vocabulary import bos_ids, check_ids, check_vocabulary_size, load_vocabulary
from fam_jax.generation.sampling import GREEDY, Sampling
from fam_jax.generation.state_file import load_state, save_state
from fam_jax.generation.streaming import Streamer
from fam_jax.generation.tokenize import Detokenizer, encode_pieces, read_text
from fam_jax.memories.window_cache import ShownByShape
from fam_jax.model import StreamState
from fam_jax.restore import load_model

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
    # "length", "end" (the vocabulary's end token) or the stop string.
    ended_by: str
    # After all of these tokens.
    state: TextState


class TextModel:
    """A model that reads and writes text through a state of constant size."""

    def __init__(self, config: Config, params: dict[str, Any], vocabulary: Any):
        """Take parameters, with any LoRA merged, and a vocabulary from `fam_jax.data.vocabulary`.

        Raises:
          UserError: the parameters do not fit the model, the vocabulary is larger than the model's, or it has no start
            token although config.data.add_bos asks for one.
        """
        check_vocabulary_size(vocabulary, config.model, config.data)
        self.config, self.vocabulary = config, vocabulary
        self.streamer = Streamer(config.model, params)
        self._begin = bos_ids(vocabulary, config.data)

    @classmethod
    def restore(
        cls, folder: str | os.PathLike[str], step: int | None = None, mesh: jax.sharding.Mesh | None = None
    ) -> "TextModel":
        """Load the model of a training run; arguments and errors are those of :func:`load_model`."""
        config, params, _ = load_model(folder, step, mesh)
        return cls(config, params, load_vocabulary(config.data.vocabulary))

    def read(
        self,
        source: BinaryIO | str,
        state: TextState | None = None,
        *,
        chunk_blocks: int = 16,
        on_progress: Callable[[int], None] | None = None,
    ) -> TextState:
        """Read a text of any length; host and device memory do not depend on its length.

        Args:
          source: a binary file of UTF-8 text, or the text itself.
          state: to continue; the text is tokenized on its own, and the state stays valid. None: a new stream, which
            begins with the start token if config.data.add_bos is set.
          chunk_blocks: blocks that go through the model at once.
          on_progress: called with the number of tokens read so far.

        Raises:
          UserError: the text is empty or not UTF-8, or has a token that the model has no embedding for.
        """
        if isinstance(source, str):
            name, texts = "the text", iter([source])
        else:
            name = str(getattr(source, "name", "the text"))
            texts = read_text(source, name)
        size = self.config.model.block_size
        streams = None if state is None else state.streams
        logits, done = None, 0
        # The first chunk ends at a block border, so all others are whole blocks.
        first = chunk_blocks * size - (int(state.streams.position.filled[0]) if state is not None else 0)
        pieces = encode_pieces(self.vocabulary.encode, texts)
        if state is None:
            pieces = _with_start(self._begin, pieces)
        for tokens in _chunks(pieces, first, chunk_blocks * size):
            check_ids(tokens, self.vocabulary, self.config.model.vocab_size)
            logits, streams = self.streamer.read([tokens], streams, chunk_blocks=chunk_blocks)
            done += len(tokens)
            if on_progress is not None:
                jax.block_until_ready(logits)
                on_progress(done)
        if streams is None or logits is None:
            raise UserError(f"{name}: holds no tokens; give at least one character to read")
        return TextState(streams, logits)

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
          max_tokens: where the text ends at the latest; the vocabulary's end token ends it too.
          sampling: how tokens are sampled.
          seed: of the sampling.
          stop: strings that end the text and are left out.
          on_text: called with the text as it comes; text that may be the start of a stop string is held back.

        Raises:
          UserError: max_tokens is not positive, a stop string is empty, or the state comes from a file and nothing was
            read since.
        """
        if any(not text for text in stop):
            raise UserError("stop: must not be an empty string")
        if state.logits is None:
            raise UserError("a loaded memory does not say what comes next; read a question or a prompt first")
        end = self.vocabulary.eos_id
        writer = _Writer(Detokenizer(self.vocabulary.decode), stop, on_text)
        logits, streams, done = state.logits, state.streams, 0
        key = jax.random.key(seed)
        while True:
            out = self.streamer.generate(
                logits,
                streams,
                max_tokens=min(TOKENS_PER_CALL, max_tokens - done),
                sampling=sampling,
                key=jax.random.fold_in(key, done),
                stop_tokens=[] if end is None else [end],
                tokens_per_call=TOKENS_PER_CALL,
            )
            tokens = out.tokens[0, : out.lengths[0]]
            ended = bool(out.stopped[0])
            taken = writer.add(tokens[: len(tokens) - ended].tolist())
            if taken is not None:  # a stop string: discard the tokens after it
                kept = tokens[:taken]
                logits, streams = self.streamer.read([kept], streams)
                return writer.completion(done + taken, TextState(streams, logits))
            done += len(tokens)
            logits, streams = out.logits, out.state
            if ended or done >= max_tokens:
                return writer.completion(done, TextState(streams, logits), "end" if ended else "length")

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
        return vocabulary_digest(dataclasses.asdict(self.config))


class _Writer:
    """Collect generated text, and pass on what cannot be the start of a stop string."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], on_text: Callable[[str], None] | None):
        self._detokenizer, self._stop, self._on_text = detokenizer, stop, on_text
        self._text, self._passed_on = "", 0
        self._ended_by: str | None = None

    def add(self, tokens: Sequence[int]) -> int | None:
        """Add tokens. Return how many of them completed a stop string, or None if none is complete."""
        for count, token in enumerate(tokens, 1):
            self._text += self._detokenizer.add([token])
            found = [(self._text.find(stop, self._passed_on), stop) for stop in self._stop]
            places = [(place, stop) for place, stop in found if place >= 0]
            if places:
                place, self._ended_by = min(places)
                self._text = self._text[:place]
                self._pass_on(place)
                return count
        self._pass_on(
            len(self._text) - max((_partial_stop(self._text, stop) for stop in self._stop), default=0)
        )
        return None

    def completion(self, tokens: int, state: TextState, ended_by: str = "") -> Completion:
        """Return the whole text, after passing on the rest."""
        if self._ended_by is None:
            self._text += self._detokenizer.finish()
        self._pass_on(len(self._text))
        return Completion(self._text, tokens, self._ended_by or ended_by, state)

    def _pass_on(self, until: int) -> None:
        if self._on_text is not None and until > self._passed_on:
            self._on_text(self._text[self._passed_on : until])
        self._passed_on = max(self._passed_on, until)


def _partial_stop(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the start of `stop`."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def _with_start(begin: list[int], pieces: Iterable[list[int]]) -> Iterator[list[int]]:
    """Yield the pieces of a text with `begin` before the first token; nothing for a text without tokens."""
    for piece in pieces:
        yield [*begin, *piece] if piece else piece
        begin = [] if piece else begin


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
