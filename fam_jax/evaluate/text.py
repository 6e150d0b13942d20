"""Loss on held-out documents of any length, streamed through a state of constant size without truncation.

Each document is read in full, by blocks, from an empty state. Ablation shows whether the memory is used: the same
documents are read again with what one block hands to the next made useless.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import Config, ModelConfig, UserError
from fam_jax.data.bos import first_input
from fam_jax.data.examples import Example
from fam_jax.data.quiet_seqio import seqio
from fam_jax.generate.streaming import Streamer
from fam_jax.model import StreamState
from fam_jax.model.layer_types import memory_of

Progress = Callable[[str, int, int], None]

FIRST_EDGE = 16  # tokens: positions before it are one bucket; the next ends at twice as many, and so on


class Scores(NamedTuple):
    """Scores of one document's tokens (n,)."""

    nats: np.ndarray
    correct: np.ndarray
    # bool: tokens with a loss weight.
    counted: np.ndarray


def evaluate_text(
    config: Config,
    params: Any,
    *,
    examples: Sequence[Example],
    vocabulary: seqio.Vocabulary,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the loss, also by position and without the memory.

    Args:
      config: of the run; `config.evaluate` has the batch size, the chunks and the ablations.
      params: nested dict of parameters, on any devices.
      examples: documents. Tokens of weight 0 are read but not counted.
      vocabulary: of the examples.
      on_progress: called with the name of a pass ("loss", or an ablation), its tokens read and its tokens to read.

    Returns:
      A dict for JSON: documents, tokens, tokens_read (counted while reading, equal to tokens), longest_document
      (tokens), text_bytes, seconds, and
        scalars: headline figures, losses by position and by ablation.
        loss: nats per token, ends of documents included; perplexity: its exponential.
        bits_per_byte: of the text in UTF-8; None where there is no text.
        accuracy: fraction of tokens whose logit was above all others.
        loss_after_first_block: of the tokens that a memory could help with; None if there are none.
        by_position: buckets of positions in the document, each twice as long as the one before: begin, end, documents
          that reach it, tokens, loss, accuracy.
        ablations: for each of config.evaluate.ablations, its loss, loss_after_first_block and by_position.

    Raises:
      UserError: the vocabulary has more ids than the model, or there is only one document to shuffle states with.
    """
    evaluate, model = config.evaluate, config.model
    if vocabulary.vocab_size > model.vocab_size:
        raise UserError(
            f"vocabulary: has {vocabulary.vocab_size} ids, but the model has only {model.vocab_size}; "
            "evaluate with the vocabulary of its training"
        )
    if "shuffled" in evaluate.ablations and min(len(examples), evaluate.batch_size) < 2:
        raise UserError(
            "config.evaluate.ablations: shuffled needs two documents in a batch, to swap their states"
        )
    began = time.perf_counter()
    reader = _Reader(config, Streamer(model, params), first_input(vocabulary, config.data), on_progress)
    scores = reader.read(examples, None)
    tokens, text_bytes = sum(len(each.ids) for each in examples), sum(each.text_bytes for each in examples)
    result = _summary(scores, model.block_size)
    nats = sum(float(each.nats[each.counted].sum(dtype=np.float64)) for each in scores)
    ablations = {name: _ablation(reader, examples, name) for name in evaluate.ablations}
    measured = result | {
        "perplexity": math.exp(min(result["loss"], 700.0)),
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
    }
    return {
        "scalars": _scalars(measured, ablations),
        "documents": len(examples),
        "tokens": tokens,
        "tokens_read": sum(len(each.nats) for each in scores),
        "longest_document": max(len(each.ids) for each in examples),
        "text_bytes": text_bytes,
        **measured,
        "ablations": ablations,
        "block_size": model.block_size,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _scalars(measured: dict[str, Any], ablations: dict[str, Any]) -> dict[str, float]:
    """Return the figures with a value by name, such as loss, zeroed/loss and loss_by_position/1024."""
    names = ("loss", "perplexity", "bits_per_byte", "accuracy", "loss_after_first_block")
    found = {name: measured[name] for name in names}
    for prefix, part in (("", measured), *((f"{name}/", part) for name, part in ablations.items())):
        found |= {f"{prefix}{name}": part[name] for name in ("loss", "loss_after_first_block")}
        found |= {
            f"{prefix}loss_by_position/{bucket['end']}": bucket["loss"] for bucket in part["by_position"]
        }
    return {name: value for name, value in found.items() if value is not None}


def _ablation(reader: "_Reader", examples: Sequence[Example], name: str) -> dict[str, Any]:
    found = _summary(reader.read(examples, name), reader.config.model.block_size)
    return {key: found[key] for key in ("loss", "loss_after_first_block", "by_position")}


@dataclasses.dataclass
class _Reader:
    config: Config
    streamer: Streamer
    # Read before the first token of a document.
    start_id: int
    on_progress: Progress | None

    def read(self, examples: Sequence[Example], ablation: str | None) -> list[Scores]:
        """Return the scores of every document, in order."""
        total, done = sum(len(each.ids) for each in examples), 0
        by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        size = min(self.config.evaluate.batch_size, len(examples))
        scores: dict[int, Scores] = {}
        for begin in range(0, len(examples), size):
            # The last batch is as large as the others: documents of the one before are read again.
            batch = by_length[min(begin, len(examples) - size) :][:size]

            new = [len(examples[index].ids) for index in batch if index not in scores]

            def report(read: int, new: list[int] = new, done: int = done) -> None:
                if self.on_progress is not None:
                    self.on_progress(ablation or "loss", done + sum(min(read, n) for n in new), total)

            found = self._read_batch([examples[index] for index in batch], ablation, report)
            done += sum(new)
            scores |= dict(zip(batch, found, strict=True))
        return [scores[index] for index in range(len(examples))]

    def _read_batch(
        self, batch: list[Example], ablation: str | None, report: Callable[[int], None]
    ) -> list[Scores]:
        size, lengths = self.config.model.block_size, np.array([len(each.ids) for each in batch])
        blocks = -(-int(lengths.max()) // size)
        chunk = 1 if ablation else self.config.evaluate.chunk_blocks
        state = start = self.streamer.start(len(batch))
        nats: list[list[np.ndarray]] = [[] for _ in batch]
        correct: list[list[np.ndarray]] = [[] for _ in batch]
        for first, count in _chunks(blocks, chunk):
            begin, end = first * size, (first + count) * size
            inputs, targets = self._window(batch, begin, end)
            likeliest, logprobs, state = self.streamer.measure(
                inputs, targets, state, tokens_at_once=self.config.train.loss_chunk
            )
            if ablation:
                state = ablated(self.config.model, state, start, ablation)
            for row, length in enumerate(lengths):
                real = slice(0, max(0, int(length) - begin))
                nats[row].append(-logprobs[row, real])
                correct[row].append(likeliest[row, real] == targets[row, real])
            report(end)
        _check_all_read(state, size, blocks, lengths, [sum(map(len, parts)) for parts in nats])
        return [
            Scores(np.concatenate(nats[row]), np.concatenate(correct[row]), example.weights > 0)
            for row, example in enumerate(batch)
        ]

    def _window(self, batch: list[Example], begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets (B, end - begin); zeros after the end of a document."""
        targets = np.zeros((len(batch), end - begin), np.int32)
        inputs = np.zeros_like(targets)
        for row, example in enumerate(batch):
            part = example.ids[begin:end]
            targets[row, : len(part)] = part
            before = example.ids[max(0, begin - 1) : end - 1]
            before = np.append(np.int32(self.start_id), before) if begin == 0 else before
            inputs[row, : len(part)] = before[: len(part)]
        return inputs, targets


def _chunks(blocks: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield first block and number of blocks of every call; at the end fewer blocks, in few sizes."""
    first = 0
    while first < blocks:
        while chunk > blocks - first:
            chunk = max(chunk // 4, 1)  # every size is a program to compile
        yield first, chunk
        first += chunk


def _check_all_read(
    state: StreamState, size: int, blocks: int, lengths: np.ndarray, scored: list[int]
) -> None:
    read = state.tokens_read
    if (read != blocks * size).any() or scored != lengths.tolist():
        raise RuntimeError(
            f"documents of {lengths.tolist()} tokens were read as {read.tolist()}, and {scored} tokens were scored: "
            "results would mislead"
        )


def _summary(scores: list[Scores], block_size: int) -> dict[str, Any]:
    nats, correct = (np.concatenate([part[i][part.counted] for part in scores]) for i in (0, 1))
    places = [np.flatnonzero(part.counted) for part in scores]
    position, document = np.concatenate(places), np.repeat(np.arange(len(places)), [*map(len, places)])
    if not len(nats):
        raise UserError("held-out examples: no token has a loss weight, so there is nothing to measure")

    def mean(chosen: np.ndarray, of: np.ndarray = nats) -> float | None:
        return float(of[chosen].mean(dtype=np.float64)) if chosen.any() else None

    buckets, begin, end = [], 0, FIRST_EDGE
    while begin <= position.max():
        chosen = (position >= begin) & (position < end)
        buckets.append({
            "begin": begin, "end": end, "documents": len(np.unique(document[chosen])), "tokens": int(chosen.sum()),
            "loss": mean(chosen), "accuracy": mean(chosen, correct),
        })  # fmt: skip
        begin, end = end, 2 * end
    everything = np.ones(len(nats), bool)
    return {
        "loss": mean(everything),
        "accuracy": mean(everything, correct),
        "loss_after_first_block": mean(position >= block_size),
        "by_position": buckets,
    }


def ablated(model: ModelConfig, state: StreamState, start: StreamState, how: str) -> StreamState:
    """Return `state` with its memory made useless; frozen streams do not count as having been written."""
    memory, position = memory_of(model), state.position
    if how == "frozen":
        position = dataclasses.replace(position, carries_context=start.position.carries_context)
    return dataclasses.replace(
        state, layers=memory.ablate(state.layers, start.layers, how), position=position
    )
