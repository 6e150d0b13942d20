"""Run items on a model: read each document once, branch its memory for every question, choose or generate.

What the questions of a batch share is only the batch: the results of an item depend on the item alone, apart from
rounding.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fam_jax.evaluation.item import CHOOSE, NO_DOCUMENT, Answered, Item, Likelihood
from fam_jax.evaluation.joining import Joiner, Prefix
from fam_jax.evaluation.midway import Midway
from fam_jax.evaluation.reading import Cost, Read, Unread, read_documents
from fam_jax.generation.endings import Endings, TextWriter
from fam_jax.generation.sampling import GREEDY, Sampling
from fam_jax.generation.streaming import NotFiniteError, Streamer
from fam_jax.model import StreamState

# Generated tokens after which texts are searched for stop strings.
TOKENS_PER_CALL = 16
# A likelihood of an item: whether it is the one behind the item's own context, and the number of the choice.
Part = tuple[bool, int]


@dataclasses.dataclass(frozen=True)
class HowToAnswer:
    """How items are run. `batch_size`, `chunk_blocks` and `waiting` do not change results."""

    batch_size: int
    chunk_blocks: int
    # For generation. What is sampled for an item depends on the seed and the item's id alone.
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    # Memories of documents that wait for a batch of questions to fill up.
    waiting: int = 16


class _Ask(NamedTuple):
    """A continuation to score behind a prompt."""

    item: str
    part: Part
    ids: np.ndarray


@dataclasses.dataclass
class _Prompt:
    """A context behind a document, and what is asked there."""

    # Of the document's whole blocks; None: there are none.
    state: StreamState | None
    # (n,) what to read from that state.
    ids: np.ndarray
    # Tokens of the whole stream after `ids`.
    expected: int
    asks: list[_Ask] = dataclasses.field(default_factory=list)
    # Items that generate here.
    generates: list[str] = dataclasses.field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Return whether several items need it."""
        return len({ask.item for ask in self.asks} | {*self.generates}) > 1


@dataclasses.dataclass
class _Open:
    """An item that is not answered in full."""

    item: Item
    # Answers that are missing.
    missing: int
    # Log probability, tokens, and whether they are the likeliest.
    sums: dict[Part, tuple[float, int, bool]] = dataclasses.field(default_factory=dict)
    tokens_read: int = 0
    tokens_expected: int = 0


class Answering:
    """Runs items. `cost` and `longest_document` (tokens) say afterwards what it took."""

    def __init__(
        self,
        streamer: Streamer,
        joiner: Joiner,
        how: HowToAnswer,
        end_ids: Sequence[int],
        midway: Midway | None = None,
    ):
        """Take the model, how items are run, tokens that end a generated text, and what saves memories of documents."""
        self._streamer, self._joiner, self._how, self._midway = streamer, joiner, how, midway
        self._endings = Endings(joiner.vocabulary, end_ids, how.stop)
        self._open: dict[str, _Open] = {}
        self.cost, self.longest_document = Cost(), 0

    def run(self, items: Sequence[Item]) -> Iterator[list[Answered]]:
        """Yield the answers of a batch when they are complete. Their order is that of the work, not of the items.

        Raises:
          UserError: an item cannot be encoded, or the model's logits are not finite.
          RuntimeError: the model did not read what it should have read.
        """
        by_document: dict[str, list[Item]] = {}
        documents = {}
        for item in items:
            by_document.setdefault(item.document.key, []).append(item)
            documents[item.document.key] = item.document
        loose = by_document.pop(NO_DOCUMENT.key, [])
        yield from self._answer(self._prompts(loose, None, self._joiner.prefix(NO_DOCUMENT)))
        yield from self._run_documents({key: documents[key] for key in by_document}, by_document)
        assert not self._open

    def _run_documents(
        self, documents: Mapping[str, Any], items: Mapping[str, list[Item]]
    ) -> Iterator[list[Answered]]:
        held: dict[str, Prefix] = {}

        def load(key: str) -> np.ndarray:
            held[key] = self._joiner.prefix(documents[key])
            return held[key].ids

        unread = [
            Unread(key, functools.partial(load, key), document.size) for key, document in documents.items()
        ]
        prompts: list[_Prompt] = []
        memories = 0
        for read in read_documents(
            self._streamer,
            unread,
            rows=self._how.batch_size,
            chunk_blocks=self._how.chunk_blocks,
            cost=self.cost,
            midway=self._midway,
        ):
            self.longest_document = max(self.longest_document, read.tokens)
            prompts += self._prompts(items[read.key], read, held.pop(read.key))
            memories += read.state is not None
            if len(prompts) >= self._how.batch_size or memories >= self._how.waiting:
                yield from self._answer(prompts)
                prompts, memories = [], 0
        yield from self._answer(prompts)

    def _prompts(self, items: Iterable[Item], read: Read | None, prefix: Prefix) -> list[_Prompt]:
        """Return the prompts of items on one document; items with the same one share it."""
        found: dict[tuple[bool, bytes], _Prompt] = {}
        alone = self._joiner.prefix(NO_DOCUMENT)

        def at(context: np.ndarray, *, behind: bool = True) -> _Prompt:
            # Without its document, an unconditional context begins a stream.
            if read is None or not behind:
                ids, state, before = np.concatenate([alone.ids, context]), None, 0
            else:
                ids, state = np.concatenate([read.rest, context]), read.state
                before = read.tokens - len(read.rest)
            key = (behind, context.tobytes())
            if key not in found:
                found[key] = _Prompt(state, ids, before + len(ids))
            return found[key]

        for item in items:
            if item.kind != CHOOSE:
                self._open[item.id] = _Open(item, 1)
                at(self._joiner.prompt(prefix, item.context)).generates.append(item.id)
                continue
            questions = [*_questions(item)]
            self._open[item.id] = _Open(item, len(questions))
            for behind, number, context, text in questions:
                before, ids = self._joiner.join(prefix if behind else alone, context, text)
                at(before, behind=behind).asks.append(_Ask(item.id, (behind, number), ids))
        return [*found.values()]

    def _answer(self, prompts: list[_Prompt]) -> Iterator[list[Answered]]:
        """Read prompts in batches of similar length, longest first, and answer what is asked behind them.

        Those that several items need come first, so that items are complete as early as possible.
        """
        prompts = sorted(prompts, key=lambda prompt: (not prompt.shared, -len(prompt.ids)))
        size = self._how.batch_size
        for begin in range(0, len(prompts), size):
            batch = prompts[begin : begin + size]
            done = self._answer_batch(batch)
            if done:
                yield done

    def _answer_batch(self, batch: list[_Prompt]) -> list[Answered]:
        size = self._how.batch_size
        filled = batch + [batch[-1]] * (size - len(batch))  # another size would be another program
        state = self._streamer.start(size)
        if any(prompt.state is not None for prompt in batch):
            states = [state.select([0]) if p.state is None else p.state for p in filled]
            state = states[0].join(states)
        logits, state = self._streamer.read(
            [prompt.ids for prompt in filled], state, chunk_blocks=self._how.chunk_blocks, narrow=True
        )
        self.cost.needed += sum(len(prompt.ids) for prompt in batch)
        self.cost.paid += size * max(len(prompt.ids) for prompt in batch)
        for prompt, read in zip(batch, state.tokens_read.tolist(), strict=False):
            if read != prompt.expected:
                raise RuntimeError(
                    f"the model read {read} tokens of a prompt with {prompt.expected}; the results would be "
                    "misleading"
                )
            for name in {ask.item for ask in prompt.asks} | {*prompt.generates}:
                self._open[name].tokens_read += read
                self._open[name].tokens_expected += prompt.expected
        done = self._score(batch, logits, state)
        generating = [(row, prompt.generates) for row, prompt in enumerate(batch) if prompt.generates]
        if self._how.sampling != GREEDY:  # every item has a text of its own
            generating = [(row, [name]) for row, names in generating for name in names]
        for begin in range(0, len(generating), size):
            done += self._generate(generating[begin : begin + size], logits, state)
        return done

    def _score(self, batch: list[_Prompt], logits: Any, state: StreamState) -> list[Answered]:
        """Score all continuations of a batch of prompts, those of similar length together."""
        size, done = self._how.batch_size, []
        asks = [(row, ask) for row, prompt in enumerate(batch) for ask in prompt.asks]
        asks.sort(key=lambda each: len(each[1].ids))
        for begin in range(0, len(asks), size):
            part = asks[begin : begin + size]
            rows = [row for row, _ in part] + [part[-1][0]] * (size - len(part))
            texts = [ask.ids for _, ask in part] + [part[-1][1].ids] * (size - len(part))
            chosen = logits[np.asarray(rows)]
            scores = self._streamer.score(texts, chosen, state.select(rows))
            for (row, ask), (likeliest, logprobs) in zip(part, scores, strict=False):
                total = float(np.sum(logprobs, dtype=np.float64))
                if math.isnan(total):
                    raise NotFiniteError(f"item {ask.item}: {NotFiniteError.reason(batch[row].expected)}")
                greedy = np.array_equal(likeliest, ask.ids)
                self._open[ask.item].sums[ask.part] = (total, len(ask.ids), greedy)
                done += self._close(ask.item)
        return done

    def _generate(
        self, asked: Sequence[tuple[int, list[str]]], logits: Any, state: StreamState
    ) -> list[Answered]:
        """Generate a text behind each of some rows, at most as many as a batch has, for the items named with it."""
        how, rows = self._how, [row for row, _ in asked]
        filled = rows + [rows[-1]] * (how.batch_size - len(rows))
        logits, state = logits[np.asarray(filled)], state.select(filled)
        writers = [TextWriter(self._joiner.vocabulary.decode, self._endings) for _ in rows]
        counts, made = [0] * len(rows), 0
        while made < how.max_tokens and any(writer.ended_by is None for writer in writers):
            wanted = min(TOKENS_PER_CALL, how.max_tokens - made)
            out = self._streamer.generate(
                logits,
                state,
                max_tokens=wanted,
                sampling=how.sampling,
                key=self._keys([names[0] for _, names in asked], made),
                stop_tokens=self._endings.tokens,
                tokens_per_call=wanted,
            )
            logits, state, made = out.logits, out.state, made + wanted
            for number, writer in enumerate(writers):
                if writer.ended_by is None:
                    tokens = out.tokens[number, : out.lengths[number]].tolist()
                    counts[number] += writer.add(tokens, stopped=bool(out.stopped[number]))
        done = []
        for (_, names), writer, count in zip(asked, writers, counts, strict=True):
            text = writer.finish()
            assert writer.ended_by is not None
            for name in names:
                done += self._close(name, text=text, ended_by=writer.ended_by, tokens_generated=count)
        return done

    def _keys(self, names: Sequence[str], made: int) -> jax.Array | None:
        """Return a key per row of a batch to sample with, behind `made` tokens; None for greedy decoding."""
        if self._how.sampling == GREEDY:
            return None
        filled = [*names] + [names[-1]] * (self._how.batch_size - len(names))
        digests = [hashlib.blake2b(name.encode(), digest_size=4).digest() for name in filled]
        numbers = np.array([int.from_bytes(digest) for digest in digests], np.uint32)
        begin = jax.random.fold_in(jax.random.key(self._how.seed), made)
        return jax.vmap(jax.random.fold_in, (None, 0))(begin, numbers)

    def _close(self, name: str, **generated: Any) -> list[Answered]:
        """Count an answer of an item; return the item if it was the last one."""
        found = self._open[name]
        found.missing -= 1
        if found.missing:
            return []
        del self._open[name]
        item = found.item
        counts: dict[str, Any] = {"tokens_read": found.tokens_read, "tokens_expected": found.tokens_expected}
        if item.kind != CHOOSE:
            return [Answered(item, **counts, **generated)]
        likelihoods = []
        for number in range(item.answers):
            text = item.choices[0 if item.contexts else number]
            plain = found.sums.get((False, number))
            total, tokens, greedy = found.sums[(True, number)]
            unconditional = None if plain is None else plain[0]
            likelihoods.append(Likelihood(total, tokens, len(text.strip().encode()), unconditional, greedy))
        return [Answered(item, tuple(likelihoods), **counts)]


def _questions(item: Item) -> Iterator[tuple[bool, int, str, str]]:
    """Yield whether a likelihood is the item's own, the number of the choice, and context and continuation."""
    for number in range(item.answers):
        if item.contexts:
            yield True, number, item.contexts[number], item.choices[0]
            continue
        yield True, number, item.context, item.choices[number]
        if item.unconditional is not None:
            yield False, number, item.unconditional, item.choices[number]
