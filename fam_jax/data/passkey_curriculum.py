"""Training batches of PassKey, whose fillers grow as the model learns."""

import weakref
from collections.abc import Iterator
from typing import Any

from fam_jax.config import DataConfig, ceil_div
from fam_jax.data.curriculum import Curriculum, CurriculumState
from fam_jax.data.interface import Batch, BatchSpec, new_streams
from fam_jax.data.passkey import examples_at, make_template, passkey_task
from fam_jax.data.passkey_rows import GoingOnRows
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.vocabulary import bos_ids, load_vocabulary

# Batches made ahead, per stage.
PREFETCH = 2


def stage_tokens(data: DataConfig, vocabulary: seqio.Vocabulary, block_size: int) -> tuple[int, ...]:
    """Return the row length of each stage in tokens, a multiple of the block size.

    Raises:
      UserError: the vocabulary cannot express the task's text.
    """
    if data.questions > 1:
        rows = GoingOnRows(data, BatchSpec(block_size, 1, 0), vocabulary)
        return tuple(rows.row_tokens(blocks) for blocks in data.stage_blocks)
    template = make_template(vocabulary, bos_ids(vocabulary, data))
    # A sequence of n tokens has n - 1 inputs.
    late = data.late_keys > 0
    longest = (
        template.longest_example(blocks * block_size, data.digits, late=late) - 1
        for blocks in data.stage_blocks
    )
    return tuple(ceil_div(tokens, block_size) * block_size for tokens in longest)


class PasskeyCurriculum(Curriculum):
    """A curriculum of filler lengths.

    Fillers of stage s have more than stage_blocks[s - 1] (for s = 0: min_filler_blocks) and up to stage_blocks[s]
    blocks; their lengths are uniform over the multiples of filler_step tokens.
    """

    name, length_of = "passkey", "filler"

    def __init__(self, data: DataConfig, spec: BatchSpec):
        """Prepare the stages. The first call of :meth:`next` makes the first examples.

        Args:
          data: vocabulary, lengths, curriculum and loss weights.
          spec: the size of batches, and the seed of everything random.

        Raises:
          UserError: the vocabulary cannot be loaded or cannot express the task, or the number of processes does not
            divide B.
        """
        vocabulary = load_vocabulary(data.vocabulary)
        self._begin = bos_ids(vocabulary, data)
        lower = (data.min_filler_blocks, *data.stage_blocks)
        self._fillers = [
            (low * spec.block_size + data.filler_step, high * spec.block_size)
            for low, high in zip(lower, data.stage_blocks, strict=False)
        ]
        self._going_on = GoingOnRows(data, spec, vocabulary) if data.questions > 1 else None
        # By stage. Threads make batches ahead and call Python for it; TensorFlow waits for them when it frees the
        # iterators. So free them before the interpreter shuts down, or the program can hang at its end.
        self._batches: dict[int, Iterator[Batch]] = {}
        weakref.finalize(self, self._batches.clear)
        super().__init__(data, spec, vocabulary, stage_tokens(data, vocabulary, spec.block_size))

    def _make(self, stage: int) -> Batch:
        """Return rows with the key, or rows that go on with those of the batch before.

        Targets of the answer have weight 1, those before it data.prompt_weight, and padding 0.
        """
        if self._going_on is not None:
            # Writing and keeping are learned first, from rows that have the key. Batches of earlier stages go on, too.
            position = self._position
            going_on = max(0, position.stage_steps - self.data.max_stage_steps) if self.on_last_stage else 0
            return self._going_on.batch(position.step, self.data.stage_blocks[stage], going_on)
        if stage not in self._batches:
            self._batches[stage] = self._stage_batches(stage)
        return next(self._batches[stage]) | {"start": new_streams(len(self._own_rows))}

    def _identity(self) -> dict[str, Any]:
        """Return what the examples of a position depend on."""
        data = self.data
        return {
            "seed": self.spec.seed,
            "block_size": self.spec.block_size,
            "digits": data.digits,
            "min_filler_blocks": data.min_filler_blocks,
            "filler_step": data.filler_step,
            "stage_blocks": list(data.stage_blocks),
            # Absent where they have the values that all runs had before there were such fields.
            **({"late_keys": data.late_keys} if data.late_keys else {}),
            **({"questions": data.questions} if data.questions > 1 else {}),
        }

    def _start(self, position: CurriculumState) -> None:
        super()._start(position)
        self._batches.clear()

    def _stage_batches(self, stage: int) -> Iterator[Batch]:
        """Yield batches of a stage from the first example not drawn yet; one thread makes them ahead."""
        task = passkey_task(
            f"passkey_stage_{stage}",
            self.vocabulary,
            self._fillers[stage],
            self.spec.seed,
            self.data.digits,
            filler_step=self.data.filler_step,
            begin=self._begin,
            late=(self.data.late_keys, self.spec.block_size),
        )
        rows = len(self._own_rows)
        first = self._position.examples[stage] + self._own_rows.start

        def example_index(k: tf.Tensor) -> tf.Tensor:
            return first + k // rows * self.spec.batch_size + k % rows

        indices = tf.data.Dataset.range(tf.int64.max // self.spec.batch_size).map(example_index)
        dataset = examples_at(task, "train", indices).map(self._to_row)
        shapes = {name: [self.stage_tokens[stage]] for name in dataset.element_spec}
        dataset = dataset.padded_batch(rows, shapes, drop_remainder=True)
        options = tf.data.Options()
        # Autotuning would start threads that compete with training on a CPU.
        options.autotune.enabled = False
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        return dataset.prefetch(PREFETCH).with_options(options).as_numpy_iterator()

    def _to_row(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return an example as inputs, targets, weights and answer, each (n - 1,)."""
        tokens = tf.concat([example["inputs"], example["targets"]], axis=0)
        # Target j is token j + 1, and the first answer token follows the prompt.
        answer = tf.range(1, tf.size(tokens)) >= tf.size(example["inputs"])
        weights = tf.where(answer, 1.0, self.data.prompt_weight)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights, "answer": answer}
