"""Answers to questions, generated from a streamed state and compared with the right ones token by token.

A prompt is read chunk by chunk, so its contents can reach the answer only through the state of constant size. The state
itself counts the tokens that were read.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.table

from fam_jax.config import EvaluateConfig
from fam_jax.evaluation.documents import Documents
from fam_jax.evaluation.task import Measured, Metric, OnProgress, Setting, make_table
from fam_jax.generation.compiled import TIE
from fam_jax.generation.streaming import Streamer

# Prompt and answer, each (tokens,) int32.
Question = tuple[np.ndarray, np.ndarray]

METRICS = {
    "exact_match": Metric("exact match", ".1%"),
    "teacher_forced_exact_match": Metric("teacher-forced exact match", ".1%"),
    "answer_token_accuracy": Metric("answer-token accuracy", ".1%"),
}


class Questions(NamedTuple):
    """Questions in groups, such as one per length of the prompt."""

    # Functions that make a group's questions, by name of the group. Long prompts are made when they are needed.
    groups: Mapping[str, Callable[[], Sequence[Question]]]
    # What a group's name stands for, such as "blocks" for a number of blocks.
    grouped_by: str
    vocabulary: Any
    # How the questions were made, for the record.
    facts: Mapping[str, Any]


def measure_answers(
    streamer: Streamer, questions: Questions, setting: Setting, on_progress: OnProgress | None = None
) -> Measured:
    """Generate the answer to each question greedily, and also score the right answer with teacher forcing.

    A predicted token is right only if its logit is above all others: a tie counts as wrong.

    Args:
      streamer: the model.
      questions: the questions in groups.
      setting: `setting.evaluate` sets the batch size and the blocks read at a time.
      on_progress: called with a group ("4 blocks") and, for its prompts, the tokens read and the tokens to read.

    Returns:
      Scalars: each metric as the mean of all groups, and for each group, such as exact_match/4_blocks. Details: the
      facts, `grouped_by`, and `groups` with for each group
        exact_match: fraction of answers of which every generated token is right.
        teacher_forced_exact_match: the same with each token predicted after the true tokens before it. Because
          generation is greedy, it differs from exact_match only if generating and reading disagree.
        answer_token_accuracy: fraction of the answers' tokens that are right, teacher-forced.
        questions: number of questions.
        tokens_read, tokens_read_most: fewest and most tokens of a prompt, as counted by the state.
        seconds: for reading and generating, with compilation.
    """
    groups = {}
    for name, make in questions.groups.items():
        title = f"{name} {questions.grouped_by}"
        report = None if on_progress is None else functools.partial(on_progress, title)
        groups[name] = _measure_group(streamer, make(), setting.evaluate, report)
    scalars = {metric: float(np.mean([row[metric] for row in groups.values()])) for metric in METRICS}
    scalars |= {
        f"{metric}/{name}_{questions.grouped_by}": row[metric]
        for metric in METRICS
        for name, row in groups.items()
    }
    return Measured(scalars, {"groups": groups, "grouped_by": questions.grouped_by, **questions.facts})


def _measure_group(
    streamer: Streamer,
    questions: Sequence[Question],
    evaluate: EvaluateConfig,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    began, done = time.perf_counter(), 0
    total = sum(len(prompt) for prompt, _ in questions)
    generated, forced, tokens_read = [], [], []
    for batch, real in _batches(questions, evaluate.batch_size):
        prompts, answers = zip(*batch, strict=True)
        new = sum(map(len, prompts[:real]))

        def report(read: int, of: int, done: int = done, new: int = new) -> None:
            if on_progress is not None:
                on_progress(done + new * read // of, total)

        logits, state = streamer.read(prompts, chunk_blocks=evaluate.chunk_blocks, on_progress=report)
        tokens_read += _checked_counts(state.tokens_read, prompts)[:real]
        scores = streamer.score(answers, logits, state)
        tokens = streamer.generate(logits, state, max_tokens=max(map(len, answers))).tokens
        for row, answer in enumerate(answers[:real]):
            likeliest, _ = scores[row]
            right = (tokens[row, : len(answer)] == answer) & (likeliest != TIE)
            generated.append(bool(right.all()))
            forced.append(likeliest == answer)
        done += new
    return {
        "exact_match": float(np.mean(generated)),
        "teacher_forced_exact_match": float(np.mean([right.all() for right in forced])),
        "answer_token_accuracy": float(np.concatenate(forced).mean()),
        "questions": len(questions),
        "tokens_read": min(tokens_read),
        "tokens_read_most": max(tokens_read),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _batches(questions: Sequence[Question], size: int) -> Iterator[tuple[list[Question], int]]:
    """Yield batches of equal size, and how many rows of each are real; the last batch is padded with its last row."""
    size = min(size, len(questions))
    for begin in range(0, len(questions), size):
        batch = [*questions[begin : begin + size]]
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


def _checked_counts(counts: np.ndarray, prompts: Sequence[np.ndarray]) -> list[int]:
    expected = [len(prompt) for prompt in prompts]
    if counts.tolist() != expected:
        raise RuntimeError(
            f"the model read {counts.tolist()} tokens of prompts with {expected}; the results would be misleading"
        )
    return counts.tolist()


def question_documents(questions: Questions) -> Documents:
    """Return a document for each question of all groups, of which the tokens of the answer count."""
    from fam_jax.data.interface import Example  # imports TensorFlow

    pairs = [pair for make in questions.groups.values() for pair in make()]
    examples = []
    for prompt, answer in pairs:
        weights = np.append(np.zeros(len(prompt) - 1, np.float32), np.ones(len(answer), np.float32))
        examples.append(Example(np.append(prompt[1:], answer), weights, 0))
    starts = [int(prompt[0]) for prompt, _ in pairs]
    return Documents(examples, questions.vocabulary, starts[0], starts=starts, answers=True)


def answer_tables(details: dict[str, Any], title: str) -> list[rich.table.Table]:
    """Return a table with a row per group."""
    labels = [metric.label for metric in METRICS.values()]
    table = make_table(title, (details["grouped_by"], "tokens read", "questions", *labels, "seconds"))
    for name, row in details["groups"].items():
        shares = (f"{row[metric]:{METRICS[metric].form}}" for metric in METRICS)
        counts = (f"{row['tokens_read']:,}", f"{row['questions']:,}")
        table.add_row(name, *counts, *shares, f"{row['seconds']:.1f}")
    return [table]
