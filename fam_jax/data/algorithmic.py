"""Small tasks that need a memory: pairs of keys and values to remember, lists to copy or to reverse.

The texts are those of the papers that introduced the tasks, spelled in letters: associative remember and rewrite
(ARMT, arXiv 2407.04841), copy and reverse (Recurrent Memory Transformer, arXiv 2207.06881). An example is a pure
function of (task, seed, split, length, index).

    remember  ba=k;cd=a;  cd?a;        asks for the value of one of the keys, all of which differ
    rewrite   ba=k;ba=a;  ba?a;        keys repeat, and the last value counts
    copy      hgca=hgcahgca            asks for a list, twice
    reverse   hgca=acgh                asks for a list, backwards
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig, ceil_div
from fam_jax.config.data import ALGORITHMIC
from fam_jax.data.curriculum import Curriculum
from fam_jax.data.interface import Batch, BatchSpec, new_streams
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.randomness import random_key
from fam_jax.data.vocabulary import load_vocabulary

# Of keys and values.
LETTERS = "abcdefghijklmnop"
# Of lists.
LISTED = LETTERS[:8]


class Text(NamedTuple):
    """An example. Every character is a token."""

    prompt: str
    answer: str


class Sizes(NamedTuple):
    """What the length of a text depends on."""

    # C
    block_size: int
    # Letters of a key, and of a value.
    key: int
    value: int

    @property
    def pair(self) -> int:
        """Return the tokens of a pair, such as "ab=c;"."""
        return self.key + self.value + 2

    def pairs(self, blocks: int) -> int:
        """Return the number of pairs in so many blocks."""
        return blocks * self.block_size // self.pair


def spelled(number: int, letters: int) -> str:
    """Return a number as so many letters, the least significant first."""
    found = ""
    for _ in range(letters):
        number, digit = divmod(number, len(LETTERS))
        found += LETTERS[digit]
    return found


def _pairs(sizes: Sizes, blocks: int, random: np.random.Generator, *, repeated: bool) -> Text:
    count, known = sizes.pairs(blocks), len(LETTERS) ** sizes.key
    keys = random.integers(known, size=count) if repeated else random.choice(known, count, replace=False)
    values = random.integers(len(LETTERS) ** sizes.value, size=count)
    # All keys that are there are equally likely, however often they were written.
    last = dict(zip(keys.tolist(), values.tolist(), strict=True))
    asked = sorted(last)[int(random.integers(len(last)))]
    text = "".join(
        f"{spelled(key, sizes.key)}={spelled(value, sizes.value)};"
        for key, value in zip(keys.tolist(), values.tolist(), strict=True)
    )
    return Text(f"{text}{spelled(asked, sizes.key)}?", f"{spelled(last[asked], sizes.value)};")


def _repeat(sizes: Sizes, blocks: int, random: np.random.Generator, *, backwards: bool) -> Text:
    listed = "".join(LISTED[n] for n in random.integers(len(LISTED), size=blocks * sizes.block_size))
    return Text(f"{listed}=", listed[::-1] if backwards else listed + listed)


# Functions that make the example of so many blocks from random numbers. Its length depends on the blocks alone.
TASKS: dict[str, Callable[[Sizes, int, np.random.Generator], Text]] = {
    "remember": functools.partial(_pairs, repeated=False),
    "rewrite": functools.partial(_pairs, repeated=True),
    "copy": functools.partial(_repeat, backwards=False),
    "reverse": functools.partial(_repeat, backwards=True),
}
PAIRS = ("remember", "rewrite")


class Examples:
    """Examples of the task that data.task names, as tokens."""

    def __init__(self, data: DataConfig, block_size: int, longest: int):
        """Check that examples of up to `longest` blocks exist.

        Args:
          data: task, vocabulary, and the letters of keys and values.
          block_size: C.
          longest: blocks of pairs, or of a list.

        Raises:
          ConfigError: pairs do not fill a block, or there are not that many keys.
          UserError: the vocabulary cannot be loaded.
        """
        self.name = data.task.partition(":")[2]
        self.sizes = Sizes(block_size, data.key_letters, data.value_letters)
        self.vocabulary: seqio.Vocabulary = load_vocabulary(data.vocabulary)
        sizes = self.sizes
        if self.name in PAIRS and block_size % sizes.pair:
            raise ConfigError(
                f"config.model.block_size: {block_size} is not a multiple of {sizes.pair}, the tokens of a pair with "
                f"{sizes.key} letters of key and {sizes.value} of value; change one of the three"
            )
        if self.name == "remember" and sizes.pairs(longest) > len(LETTERS) ** sizes.key:
            raise ConfigError(
                f"config.data.key_letters: {sizes.pairs(longest)} pairs need as many keys, but {sizes.key} letters "
                f"spell {len(LETTERS) ** sizes.key} only; set it to {sizes.key + 1}, or ask for shorter texts"
            )

    def row_tokens(self, stage_blocks: Sequence[int]) -> tuple[int, ...]:
        """Return T of rows that hold examples of so many blocks, each a multiple of the block size."""
        size = self.sizes.block_size
        # A sequence of n tokens has n - 1 inputs.
        inputs = (sum(map(len, self._text(blocks, 0))) - 1 for blocks in stage_blocks)
        return tuple(ceil_div(tokens, size) * size for tokens in inputs)

    def example(self, blocks: int, *key: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return prompt and answer, each (tokens,) int32, of an example of so many blocks that `key` names."""
        number = random_key(ALGORITHMIC, self.name, *self.sizes, blocks, *key)
        text = self._text(blocks, number)
        prompt, answer = (np.asarray(self.vocabulary.encode(part), np.int32) for part in text)
        return prompt, answer

    def _text(self, blocks: int, key: int) -> Text:
        return TASKS[self.name](self.sizes, blocks, np.random.Generator(np.random.Philox(key=key)))


class AlgorithmicCurriculum(Curriculum):
    """A curriculum of lengths, in whole blocks of pairs or of a list.

    Examples of stage s have more than stage_blocks[s - 1] (for s = 0: min_filler_blocks) and up to stage_blocks[s]
    blocks, all equally likely.
    """

    name = ALGORITHMIC

    def __init__(self, data: DataConfig, spec: BatchSpec):
        """Prepare the stages.

        Args:
          data: task, lengths, curriculum and loss weights.
          spec: the size of batches, and the seed of everything random.

        Raises:
          ConfigError: see :class:`Examples`.
          UserError: the number of processes does not divide B.
        """
        self._examples = Examples(data, spec.block_size, data.stage_blocks[-1])
        self.length_of = "pairs in" if self._examples.name in PAIRS else "list of"
        tokens = self._examples.row_tokens(data.stage_blocks)
        super().__init__(data, spec, self._examples.vocabulary, tokens)

    def _make(self, stage: int) -> Batch:
        rows, size = len(self._own_rows), self.stage_tokens[stage]
        batch: Batch = {
            "inputs": np.zeros((rows, size), np.int32),
            "targets": np.zeros((rows, size), np.int32),
            "weights": np.zeros((rows, size), np.float32),
            "answer": np.zeros((rows, size), np.bool_),
            "start": new_streams(rows),
        }
        lower = (self.data.min_filler_blocks, *self.data.stage_blocks)[stage]
        choices = self.data.stage_blocks[stage] - lower
        for row, number in enumerate(self._own_rows):
            key = (self.spec.seed, "train", stage, self._position.examples[stage] + number)
            blocks = lower + 1 + random_key(ALGORITHMIC, "blocks", *key) % choices
            prompt, answer = self._examples.example(blocks, *key)
            tokens = np.append(prompt, answer)
            end = len(tokens) - 1
            batch["inputs"][row, :end], batch["targets"][row, :end] = tokens[:-1], tokens[1:]
            batch["weights"][row, :end] = self.data.prompt_weight
            # Target j is token j + 1, and the first answer token follows the prompt.
            batch["weights"][row, len(prompt) - 1 : end] = 1.0
            batch["answer"][row, len(prompt) - 1 : end] = True
        return batch

    def _identity(self) -> dict[str, Any]:
        return {
            "task": self._examples.name,
            "seed": self.spec.seed,
            **self._examples.sizes._asdict(),
            "min_filler_blocks": self.data.min_filler_blocks,
            "stage_blocks": list(self.data.stage_blocks),
        }


def algorithmic_stage_tokens(data: DataConfig, block_size: int) -> tuple[int, ...]:
    """Return the row length of each stage in tokens, a multiple of the block size.

    Raises:
      ConfigError: see :class:`Examples`.
      UserError: the vocabulary cannot be loaded.
    """
    return Examples(data, block_size, data.stage_blocks[-1]).row_tokens(data.stage_blocks)


def algorithmic_examples(
    data: DataConfig, block_size: int, blocks: int, keys: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return examples for evaluation by generation, which training never draws.

    Args:
      data: task, and the letters of keys and values.
      block_size: C.
      blocks: of pairs, or of the list.
      keys: number of examples.
      seed: of the examples.

    Returns:
      Pairs of prompt ids (P,) and answer ids (A,), int32.

    Raises:
      ConfigError: see :class:`Examples`.
    """
    examples = Examples(data, block_size, blocks)
    return [examples.example(blocks, seed, "validation", index) for index in range(keys)]
