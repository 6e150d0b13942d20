"""PassKey retrieval (section 3.2 of the paper), measured by generation from a streamed state.

The prompt is read chunk by chunk, so at every length the only way from the key to the answer is the state of constant
size. The state itself counts the tokens that an example has read.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fam_jax.config import Config, UserError
from fam_jax.data.passkey import passkey_examples
from fam_jax.data.quiet_seqio import seqio
from fam_jax.generate.streaming import Streamer
from fam_jax.model import StreamState

Example = tuple[np.ndarray, np.ndarray]
Progress = Callable[[int, int, int], None]


def evaluate_passkey(
    config: Config,
    params: Any,
    *,
    vocabulary: seqio.Vocabulary,
    filler_blocks: Sequence[int] | None = None,
    keys: int | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the retrieval of hidden keys at each length of filler.

    Args:
      config: of the run; `config.evaluate` sets seed, batch size, chunks, and the defaults of the next two.
      params: nested dict of parameters, on any devices.
      vocabulary: of the training data.
      filler_blocks: lengths of filler in blocks; a filler has exactly blocks * C tokens.
      keys: examples per length.
      on_progress: called with a length in blocks, and of its prompts the tokens read and the tokens to read.

    Returns:
      A dict for JSON. `scalars` has the exact match at each length, and its mean. `lengths` has for each length (as a
      string):
        exact_match: fraction of keys whose answer, generated greedily token by token, is right in every token.
        teacher_forced_exact_match: the same with each token predicted after the true ones before it. As decoding is
          greedy, it differs from exact_match only if decoding and reading disagree.
        answer_token_accuracy: fraction of the answers' tokens that are right, teacher-forced.
        keys: number of examples.
        tokens_read, tokens_read_most: fewest and most tokens of a prompt, as counted by the states.
        seconds: of reading and generating, with compilation.

    Raises:
      UserError: the vocabulary has more ids than the model.
    """
    if vocabulary.vocab_size > config.model.vocab_size:
        raise UserError(
            f"vocabulary: has {vocabulary.vocab_size} ids, but the model has only {config.model.vocab_size}; "
            "evaluate with the vocabulary of its training"
        )
    evaluate, streamer = config.evaluate, Streamer(config.model, params)
    keys = evaluate.keys if keys is None else keys
    lengths = {}
    for blocks in evaluate.filler_blocks if filler_blocks is None else filler_blocks:
        examples = passkey_examples(
            config.data, vocabulary, blocks * config.model.block_size, keys, evaluate.seed
        )
        lengths[str(blocks)] = _evaluate_length(config, streamer, examples, blocks, on_progress)
    matches = {f"exact_match/{blocks}_blocks": row["exact_match"] for blocks, row in lengths.items()}
    return {
        "scalars": {"exact_match": float(np.mean([*matches.values()])), **matches},
        "lengths": lengths,
        "block_size": config.model.block_size,
        "digits": config.data.digits,
        "seed": evaluate.seed,
        "batch_size": evaluate.batch_size,
        "chunk_blocks": evaluate.chunk_blocks,
    }


def _evaluate_length(
    config: Config, streamer: Streamer, examples: list[Example], blocks: int, on_progress: Progress | None
) -> dict[str, Any]:
    began, done = time.perf_counter(), 0
    total = sum(len(prompt) for prompt, _ in examples)
    generated, forced, tokens_read = [], [], []
    for batch, real in _batches(examples, config.evaluate.batch_size):
        prompts, answers = zip(*batch, strict=True)

        def report(read: int, of: int, done: int = done, real: int = real, prompts: Any = prompts) -> None:
            if on_progress is not None:
                share = sum(map(len, prompts[:real])) * read // of
                on_progress(blocks, done + share, total)

        logits, state = streamer.read(prompts, chunk_blocks=config.evaluate.chunk_blocks, on_progress=report)
        scores = streamer.score(answers, logits, state)
        tokens = streamer.generate(logits, state, max_tokens=max(map(len, answers))).tokens
        for row in range(real):
            answer = answers[row]
            generated.append(bool((tokens[row, : len(answer)] == answer).all()))
            forced.append(scores[row][0] == answer)
        tokens_read += _count_tokens(state, prompts)[:real]
        done += sum(map(len, prompts[:real]))
    return {
        "exact_match": float(np.mean(generated)),
        "teacher_forced_exact_match": float(np.mean([right.all() for right in forced])),
        "answer_token_accuracy": float(np.concatenate(forced).mean()),
        "keys": len(examples),
        "tokens_read": min(tokens_read),
        "tokens_read_most": max(tokens_read),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _batches(examples: list[Example], size: int) -> Iterator[tuple[list[Example], int]]:
    """Yield batches of one size, and how many of each are real: the last is padded with its last example."""
    size = min(size, len(examples))
    for begin in range(0, len(examples), size):
        batch = examples[begin : begin + size]
        yield batch + [batch[-1]] * (size - len(batch)), len(batch)


def _count_tokens(state: StreamState, prompts: Sequence[np.ndarray]) -> list[int]:
    """Return the tokens that each stream has read, by its own count."""
    counts = state.tokens_read
    expected = [len(prompt) for prompt in prompts]
    if counts.tolist() != expected:
        raise RuntimeError(
            f"prompts of {expected} tokens were read as {counts.tolist()}: results would mislead"
        )
    return counts.tolist()
