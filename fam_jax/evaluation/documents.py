"""Documents of any length, read in full by blocks through a state of constant size, with a score for every token.

Something may be done to the state after every block, such as an ablation of the memory. Documents can also be read in
parts, each as a stream of its own that knows nothing of what came before.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fam_jax.config import ceil_div
from fam_jax.evaluation.reading import call_blocks, rows_to_use
from fam_jax.evaluation.task import OnProgress, Setting
from fam_jax.generation.compiled import row_ways
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState, ablated

if TYPE_CHECKING:
    from fam_jax.data.interface import Example  # imports TensorFlow, which takes seconds


class Documents(NamedTuple):
    """Texts to measure a model on."""

    # Tokens of weight 0 are read but not counted.
    examples: "Sequence[Example]"
    vocabulary: Any
    # The token read before the first one of each document.
    start_id: int
    # Longest row in training, for the plot; 0: unknown.
    trained_tokens: int = 0
    # The token read before each document, in place of `start_id`; empty: `start_id` before all.
    starts: Sequence[int] = ()
    # Whether the counted tokens of a document are an answer that is right only as a whole.
    answers: bool = False


class Scores(NamedTuple):
    """Scores of one document's tokens (n,)."""

    nats: np.ndarray
    correct: np.ndarray
    # bool: tokens with a loss weight.
    counted: np.ndarray


class Excerpt(NamedTuple):
    """Consecutive blocks of a document, to read as a stream of their own."""

    # Number of the document.
    document: int
    # The first block to read, the first one to score, and the one after the last.
    begin: int
    scored: int
    end: int


# Called after every block with the state, the state of streams that have read nothing, the number of blocks read, and
# the numbers of the documents in the batch; returns the state to go on from.
AfterBlock = Callable[[StreamState, StreamState, int, Sequence[int]], StreamState]


def ablation(streamer: Streamer, how: str) -> AfterBlock:
    """Return what replaces the memory after every block; see :func:`fam_jax.model.ablated`."""
    return lambda state, start, blocks, batch: ablated(streamer.config, state, start, how)


@dataclasses.dataclass
class DocumentReader:
    """Read documents with a model, several at a time."""

    streamer: Streamer
    documents: Documents
    setting: Setting
    on_progress: OnProgress | None = None

    @property
    def rows(self) -> int:
        """Return the documents of a batch."""
        return min(self.setting.evaluate.batch_size, len(self.documents.examples))

    def blocks(self, document: int) -> int:
        """Return the blocks of a document, the last of which may be incomplete."""
        return ceil_div(len(self.documents.examples[document].ids), self.streamer.config.block_size)

    def read_by_block(self, name: str, after_block: AfterBlock | None = None) -> list[Scores]:
        """Return the scores of every document, in order, read block by block beside others of similar length.

        All such passes run the same program. So what a change after every block makes no difference to stays the same
        bit for bit.

        Args:
          name: of the pass, for the progress.
          after_block: called after every block.
        """
        examples = self.documents.examples
        total, done = sum(len(each.ids) for each in examples), 0
        by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        scores: dict[int, Scores] = {}
        for begin in range(0, len(examples), self.rows):
            # Fill the last batch with documents of the one before: another batch size means another compilation.
            batch = by_length[min(begin, len(examples) - self.rows) :][: self.rows]
            new = [len(examples[index].ids) for index in batch if index not in scores]

            def report(read: int, new: list[int] = new, done: int = done) -> None:
                if self.on_progress is not None:
                    self.on_progress(name, done + sum(min(read, n) for n in new), total)

            found = self._read_batch(batch, after_block, report)
            done += sum(new)
            scores |= dict(zip(batch, found, strict=True))
        return [scores[index] for index in range(len(examples))]

    def read(self, name: str) -> list[Scores]:
        """Return the scores of every document, in order. A row whose document has ended takes the longest one left.

        Args:
          name: of the pass, for the progress.
        """
        chunk, total = (
            self.setting.evaluate.chunk_blocks,
            sum(len(each.ids) for each in self.documents.examples),
        )
        size, examples = self.streamer.config.block_size, self.documents.examples
        blocks = [max(1, self.blocks(index)) for index in range(len(examples))]
        count = rows_to_use(blocks, self.rows, row_ways(self.streamer.mesh))
        waiting = iter(sorted(range(len(examples)), key=lambda index: -blocks[index]))
        # The document of each row, and the block where it stands. A row that rests reads its last document again.
        batch, first = [next(waiting) for _ in range(count)], [0] * count
        busy = {*range(count)}
        state, fresh = self.streamer.start(count), self.streamer.start(1)
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {index: [] for index in range(len(examples))}
        done = 0
        while busy:
            wanted = call_blocks(min(blocks[batch[row]] - first[row] for row in busy), chunk)
            lost, right, state = self._measure(batch, first, wanted, state)
            for row in sorted(busy):
                index = batch[row]
                real = slice(0, max(0, len(examples[index].ids) - first[row] * size))
                parts[index].append((lost[row, real], right[row, real]))
                done += len(parts[index][-1][0])
                first[row] += wanted
                if first[row] < blocks[index]:
                    continue
                _check_all_read(state.select([row]), blocks[index] * size, [index], examples, parts)
                following = next(waiting, None)
                if following is None:
                    busy.remove(row)
                    first[row] = 0
                    continue
                batch[row], first[row] = following, 0
                state = state.replace_row(row, fresh)
            if self.on_progress is not None:
                self.on_progress(name, done, total)
        return [self._scores(index, parts[index]) for index in range(len(examples))]

    def _scores(self, index: int, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
        nats, right = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Scores(nats, right, self.documents.examples[index].weights > 0)

    def _read_batch(
        self,
        batch: Sequence[int],
        after_block: AfterBlock | None,
        report: Callable[[int], None],
    ) -> list[Scores]:
        examples, size = [self.documents.examples[index] for index in batch], self.streamer.config.block_size
        lengths = np.array([len(each.ids) for each in examples])
        blocks = ceil_div(int(lengths.max()), size)
        state = start = self.streamer.start(len(batch))
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {index: [] for index in batch}
        for first in range(blocks):
            begin, end = first * size, (first + 1) * size
            lost, right, state = self._measure(batch, [first] * len(batch), 1, state)
            if after_block:
                state = after_block(state, start, first + 1, batch)
            for row, (index, length) in enumerate(zip(batch, lengths, strict=True)):
                real = slice(0, max(0, int(length) - begin))
                parts[index].append((lost[row, real], right[row, real]))
            report(end)
        _check_all_read(state, blocks * size, batch, self.documents.examples, parts)
        return [self._scores(index, parts[index]) for index in batch]

    def read_excerpts(self, name: str, excerpts: Sequence[Excerpt]) -> list[Scores]:
        """Return the scores of every document, in order; only tokens that an excerpt scores are counted.

        Blocks are read one at a time.
        """
        size = self.streamer.config.block_size
        found = [
            Scores(
                np.zeros(len(each.ids), np.float32),
                np.zeros(len(each.ids), bool),
                np.zeros(len(each.ids), bool),
            )
            for each in self.documents.examples
        ]
        ordered, done = sorted(excerpts, key=lambda each: each.end - each.begin), 0
        total = sum(each.end - each.begin for each in excerpts) * size
        for begin in range(0, len(ordered), self.rows):
            real = ordered[begin : begin + self.rows]
            batch = [*real, *[real[-1]] * (self.rows - len(real))]
            state = self.streamer.start(self.rows)
            for step in range(max(each.end - each.begin for each in real)):
                documents, blocks = [each.document for each in batch], [each.begin + step for each in batch]
                lost, right, state = self._measure(documents, blocks, 1, state)
                for row, each in enumerate(real):
                    if not each.scored <= each.begin + step < each.end:
                        continue
                    whole, place = found[each.document], (each.begin + step) * size
                    count = min(size, len(whole.nats) - place)
                    whole.nats[place : place + count] = lost[row, :count]
                    whole.correct[place : place + count] = right[row, :count]
                    weights = self.documents.examples[each.document].weights
                    whole.counted[place : place + count] = weights[place : place + count] > 0
            done += sum(each.end - each.begin for each in real) * size
            if self.on_progress is not None:
                self.on_progress(name, done, total)
        return found

    def _measure(
        self, batch: Sequence[int], first: Sequence[int], count: int, state: StreamState
    ) -> tuple[np.ndarray, np.ndarray, StreamState]:
        """Read `count` blocks of documents, each from its block `first`; return nats and whether right (B, count C)."""
        inputs, targets = self.tokens(batch, first, count)
        likeliest, logprobs, state = self.streamer.measure(
            inputs, targets, state, tokens_at_once=self.setting.tokens_at_once
        )
        return -logprobs, likeliest == targets, state

    def tokens(self, batch: Sequence[int], first: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets (B, count C) from block `first` of each document; zeros after its end."""
        size = self.streamer.config.block_size
        targets = np.zeros((len(batch), count * size), np.int32)
        inputs = np.zeros_like(targets)
        for row, (index, block) in enumerate(zip(batch, first, strict=True)):
            ids, begin, end = self.documents.examples[index].ids, block * size, (block + count) * size
            part = ids[begin:end]
            targets[row, : len(part)] = part
            before = ids[max(0, begin - 1) : end - 1]
            before = np.append(np.int32(self._start(index)), before) if begin == 0 else before
            inputs[row, : len(part)] = before[: len(part)]
        return inputs, targets

    def _start(self, document: int) -> int:
        return self.documents.starts[document] if self.documents.starts else self.documents.start_id


def _check_all_read(
    state: StreamState,
    tokens: int,
    batch: Sequence[int],
    examples: "Sequence[Example]",
    parts: Mapping[int, Sequence[tuple[np.ndarray, np.ndarray]]],
) -> None:
    """Check that the rows of a state have read so many tokens, and that all tokens of their documents have scores."""
    lengths = [len(examples[index].ids) for index in batch]
    scored = [sum(len(nats) for nats, _ in parts[index]) for index in batch]
    read = state.tokens_read
    if (read != tokens).any() or scored != lengths:
        raise RuntimeError(
            f"the model read {read.tolist()} and scored {scored} tokens of documents with {lengths}; the results "
            "would be misleading"
        )
