"""Text in, text out: a trained model with its vocabulary, and what it remembers of a text.

model = TextModel.restore("runs/book")
with open("book.txt", "rb") as book:
state = model.read(book)
print(model.generate(model.read("Who did it?", state), max_tokens=32).text)
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from fam_jax.config import Config, ConfigError, UserError
from fam_jax.data.bos import bos_ids
from fam_jax.generate.memory_file import load_memory, save_memory
from fam_jax.generate.restore import load_model
from fam_jax.generate.sampling import GREEDY, Sampling
from fam_jax.generate.streaming import Streamer
from fam_jax.generate.tokenize import Detokenizer, encode_pieces, read_text
from fam_jax.model import StreamState

TOKENS_PER_CALL = 16  # between two looks at the text that is generated


@dataclasses.dataclass(frozen=True)
class State:
    """What one stream remembers: a value, to be continued in as many ways as needed."""

    memory: StreamState
    logits: jax.Array | None  # (1, V) of the next token; None: not known, as the memory comes from a file

    @property
    def tokens_read(self) -> int:
        """Of the whole stream, generated ones included."""
        return int(self.memory.tokens_read[0])


@dataclasses.dataclass(frozen=True)
class Completion:
    """What :meth:`TextModel.generate` returns."""

    text: str  # without the stop that ended it
    tokens: int  # generated, those of the stop included
    ended_by: str  # "length", "end" (the vocabulary's end token) or the text in `stop`
    state: State  # after all of these tokens


class TextModel:
    """A model that reads and writes text through a memory of constant size."""

    def __init__(self, config: Config, params: dict[str, Any], vocabulary: Any):
        """Takes the plain parameters (any LoRA merged) and a vocabulary from `fam_jax.data.vocabulary`.

        Raises:
          UserError: the parameters are of another model, the vocabulary is larger than the model's, or has no start
            token and config.data.add_bos asks for one.
        """
        if vocabulary.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"config.model.vocab_size: {config.model.vocab_size} is smaller than the vocabulary "
                f"{config.data.vocabulary!r}, which has {vocabulary.vocab_size} pieces"
            )
        self.config, self.vocabulary = config, vocabulary
        self.streamer = Streamer(config.model, params)
        self._begin = bos_ids(vocabulary, config.data)

    @classmethod
    def restore(
        cls, folder: str | os.PathLike[str], step: int | None = None, mesh: jax.sharding.Mesh | None = None
    ) -> "TextModel":
        """The model of a training run; arguments and errors are those of :func:`load_model`."""
        config, params, _ = load_model(folder, step, mesh)
        from fam_jax.data.vocabulary import load_vocabulary  # takes seconds, for TensorFlow

        return cls(config, params, load_vocabulary(config.data.vocabulary))

    def read(
        self,
        source: BinaryIO | str,
        state: State | None = None,
        *,
        chunk_blocks: int = 16,
        on_progress: Callable[[int], None] | None = None,
    ) -> State:
        """Reads a text of any length; memory, of host and device, does not depend on it.

        Args:
          source: a binary file of UTF-8 text, or the text itself.
          state: to continue, the text being encoded by itself; it stays valid. None: a new stream, which begins with
            the start token if config.data.add_bos.
          chunk_blocks: blocks that go through the model at once.
          on_progress: called with the number of tokens read so far.

        Raises:
          UserError: the text is empty or no UTF-8.
        """
        if isinstance(source, str):
            name, texts = "the text", iter([source])
        else:
            name = str(getattr(source, "name", "the text"))
            texts = read_text(source, name)
        size = self.config.model.block_size
        memory = None if state is None else state.memory
        logits, done = None, 0
        # The first chunk ends at a block border, so that all others are whole blocks.
        first = chunk_blocks * size - (int(state.memory.position.filled[0]) if state is not None else 0)
        pieces = encode_pieces(self.vocabulary.encode, texts)
        if state is None:
            pieces = _behind(self._begin, pieces)
        for tokens in _chunks(pieces, first, chunk_blocks * size):
            logits, memory = self.streamer.read([tokens], memory, chunk_blocks=chunk_blocks)
            done += len(tokens)
            if on_progress is not None:
                jax.block_until_ready(logits)
                on_progress(done)
        if memory is None or logits is None:
            raise UserError(f"{name}: holds no tokens; give at least one character to read")
        return State(memory, logits)

    def generate(
        self,
        state: State,
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Writes on from `state`, FAM updated at every block border.

        Args:
          state: from :meth:`read`.
          max_tokens: at which it ends at the latest; the vocabulary's end token ends it too.
          sampling: how tokens are drawn.
          seed: of what is drawn.
          stop: texts that end it, and are left out.
          on_text: called with the text as it comes; of a stop that has only begun, nothing is told.

        Raises:
          UserError: max_tokens is not positive, a stop is empty, or the memory comes from a file and nothing was
            read since.
        """
        if any(not text for text in stop):
            raise UserError("stop: must not be empty text")
        if state.logits is None:
            raise UserError(
                "a loaded memory does not say what comes next: let it read a question or a prompt first"
            )
        end = self.vocabulary.eos_id
        writer = _Writer(Detokenizer(self.vocabulary.decode), stop, on_text)
        logits, memory, done = state.logits, state.memory, 0
        key = jax.random.key(seed)
        while True:
            out = self.streamer.generate(
                logits, memory, max_tokens=min(TOKENS_PER_CALL, max_tokens - done), sampling=sampling,
                key=jax.random.fold_in(key, done), stop_tokens=[] if end is None else [end],
                tokens_per_call=TOKENS_PER_CALL,
            )  # fmt: skip
            tokens = out.tokens[0, : out.lengths[0]]
            ended = bool(out.stopped[0])
            taken = writer.add(tokens[: len(tokens) - ended].tolist())
            if taken is not None:  # a stop: the tokens behind it were not asked for
                kept = tokens[:taken]
                logits, memory = self.streamer.read([kept], memory)
                return writer.completion(done + taken, State(memory, logits))
            done += len(tokens)
            logits, memory = out.logits, out.memory
            if ended or done >= max_tokens:
                return writer.completion(done, State(memory, logits), "end" if ended else "length")

    def save(self, path: str | os.PathLike[str], state: State) -> None:
        """Writes the memory of `state` to a file; see :func:`save_memory`."""
        save_memory(path, state.memory, self.config.model, self.streamer.params)

    def load(self, path: str | os.PathLike[str]) -> State:
        """Reads a memory of this model, to be continued; see :func:`load_memory`.

        Raises:
          MemoryFileError: no such file, a damaged one, one of another model or of several streams.
        """
        memory = load_memory(path, self.config.model, self.streamer.params)
        if memory.batch_size != 1:
            raise UserError(
                f"{path}: holds {memory.batch_size} streams; save one of them, StreamState.select([row])"
            )
        return State(memory, None)


class _Writer:
    """Text that is generated, told as far as no stop can begin in it."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], on_text: Callable[[str], None] | None):
        self._detokenizer, self._stop, self._on_text = detokenizer, stop, on_text
        self._text, self._told = "", 0
        self._ended_by: str | None = None

    def add(self, tokens: Sequence[int]) -> int | None:
        """Takes tokens one by one; the number of those that were needed to complete a stop, if one is."""
        for count, token in enumerate(tokens, 1):
            self._text += self._detokenizer.add([token])
            found = [(self._text.find(stop, self._told), stop) for stop in self._stop]
            places = [(place, stop) for place, stop in found if place >= 0]
            if places:
                place, self._ended_by = min(places)
                self._text = self._text[:place]
                self._tell(place)
                return count
        self._tell(len(self._text) - max((_begun(self._text, stop) for stop in self._stop), default=0))
        return None

    def completion(self, tokens: int, state: State, ended_by: str = "") -> Completion:
        """All of it, with the rest told."""
        if self._ended_by is None:
            self._text += self._detokenizer.finish()
        self._tell(len(self._text))
        return Completion(self._text, tokens, self._ended_by or ended_by, state)

    def _tell(self, until: int) -> None:
        if self._on_text is not None and until > self._told:
            self._on_text(self._text[self._told : until])
        self._told = max(self._told, until)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def _behind(begin: list[int], pieces: Iterable[list[int]]) -> Iterator[list[int]]:
    """The pieces of a text with `begin` before the first token; nothing if there is none."""
    for piece in pieces:
        yield [*begin, *piece] if piece else piece
        begin = [] if piece else begin


def _chunks(pieces: Iterable[list[int]], first: int, size: int) -> Iterator[np.ndarray]:
    """Arrays of `size` ids, the first of `first`, the last of what is left."""
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
