"""Rows of PassKey that go on: each batch adds filler to a row and asks for the same key again.

A memory that keeps a key over the fillers of one row may still lose it later. Here a row goes on in the next batch,
from the memory that it left, so training sees memories of any age while gradients reach back one row only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig
from fam_jax.data.interface import Batch, BatchSpec
from fam_jax.data.passkey import Template, key_ids, key_of, make_template
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.randomness import random_key, random_words
from fam_jax.data.vocabulary import bos_ids


class Turn(NamedTuple):
    """A row's place in a batch."""

    # Digits of the key that the row is asked for.
    key: str
    # Whether the row begins with this key.
    begins: bool
    # Blocks of filler in front of the key.
    before: int


class GoingOnRows:
    """Batches of rows that go on; each is a pure function of its number, the first number, and the longest filler.

    A row of stage s has the same length in all batches. Where it begins, it has the key and stage_blocks[s] blocks of
    filler; where it goes on, filler alone, which is longer by the statement of the key. Its question ends within its
    last, unfinished block, so no answer is written into the memory.
    """

    def __init__(self, data: DataConfig, spec: BatchSpec, vocabulary: seqio.Vocabulary):
        """Tokenize the fixed parts.

        Raises:
          UserError: the vocabulary cannot express the task's text.
          ConfigError: part of an answer would lie in a complete block.
        """
        self._data, self._spec, self._vocabulary = data, spec, vocabulary
        self._template: Template = make_template(vocabulary, bos_ids(vocabulary, data))
        self._keys = random_key("passkey", "going on", spec.seed, data.digits)
        template = self._template
        statement = template.late_statement if data.late_keys else template.statement
        self._digits = digits = len(key_ids(vocabulary, "9" * data.digits))
        self._fixed = len(statement) + len(template.remember) + len(template.repeated) + 2 * digits
        self._question = len(template.question) + digits
        if (self._fixed + self._question - 1) % spec.block_size < digits:
            raise ConfigError(
                f"config.model.block_size: {spec.block_size} puts part of an answer into a complete block, which the "
                "memory would read; choose another one"
            )

    def row_tokens(self, blocks: int) -> int:
        """Return T of rows with this many blocks of filler."""
        return self._fixed + blocks * self._spec.block_size + self._question - 1

    def batch(self, number: int, blocks: int, going_on: int) -> Batch:
        """Return this process's rows of a batch.

        Args:
          number: of the batch.
          blocks: of filler in each row.
          going_on: how many batches before this one have rows that this one may go on with.
        """
        turns = [self._turn(number, row, blocks, going_on) for row in self._spec.own_rows]
        tokens = np.stack([self._tokens(turn, blocks) for turn in turns])
        answer = np.zeros(tokens[:, 1:].shape, bool)
        answer[:, -self._digits :] = True
        return {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.where(answer, 1.0, self._data.prompt_weight).astype(np.float32),
            "answer": answer,
            "start": np.array([turn.begins for turn in turns]),
        }

    def _turn(self, number: int, row: int, blocks: int, going_on: int) -> Turn:
        # Rows begin in turn, so every batch has memories of all ages.
        age = min((number + row) % self._data.questions, going_on)
        place = (number - age) * self._spec.batch_size + row
        for_key, for_place, for_whether = random_words(self._keys, place, 3)
        late = for_whether < self._data.late_keys * 2**64
        before = for_place % (blocks + 1) if late else 0
        return Turn(str(key_of(for_key, self._data.digits)), age == 0, before)

    def _tokens(self, turn: Turn, blocks: int) -> np.ndarray:
        """Return a row's tokens (T + 1,): T inputs, and T targets one token later."""
        template, size = self._template, self._spec.block_size
        key = key_ids(self._vocabulary, turn.key)
        parts: list[Sequence[int] | np.ndarray]
        if not turn.begins:
            parts = [self._filler(self._fixed + blocks * size)]
        else:
            beginning: list[Sequence[int] | np.ndarray] = [template.statement]
            if turn.before:
                opening = np.asarray(template.opening[: turn.before * size])
                beginning = [
                    opening,
                    self._filler(turn.before * size - len(opening)),
                    template.late_statement,
                ]
            statement = [*beginning, key, template.remember, key, template.repeated]
            # The filler takes what the statement leaves: the two forms of it may differ in length.
            rest = self._fixed + blocks * size - sum(map(len, statement))
            parts = [*statement, self._filler(rest)]
        return np.concatenate([*parts, template.question, key]).astype(np.int32)

    def _filler(self, tokens: int) -> np.ndarray:
        filler = np.asarray(self._template.filler)
        return filler[np.arange(tokens) % len(filler)]
