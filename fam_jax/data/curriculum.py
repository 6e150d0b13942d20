"""Training batches of PassKey, whose fillers grow as the model learns; resumable at any step."""

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from fam_jax.config import DataConfig, ceil_div
from fam_jax.data.interface import Batch, BatchSpec, check_state, new_streams
from fam_jax.data.passkey import examples_at, make_template, passkey_task
from fam_jax.data.passkey_rows import GoingOnRows
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key, random_words
from fam_jax.data.vocabulary import bos_ids, load_vocabulary

# Decay of the running exact match, which so averages over about 10 batches.
ACCURACY_DECAY = 0.9
# Batches of a stage to observe before its running exact match can end it.
MIN_REPORTS = 10
# Batches made ahead, per stage.
PREFETCH = 2


@dataclasses.dataclass
class CurriculumState:
    """The position in the curriculum. Together with the config it decides which batches come next."""

    # Batches returned.
    step: int = 0
    stage: int = 0
    # Batches returned since the stage began.
    stage_steps: int = 0
    # Examples drawn from each stage, by all processes together.
    examples: list[int] = dataclasses.field(default_factory=list)
    # Batches observed in this stage.
    reports: int = 0
    # Decayed sum of the observed exact match.
    matched: float = 0.0
    # Decayed count of observations: matched / weight is the running exact match.
    weight: float = 0.0


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


class PasskeyCurriculum:
    """Endless batches of a curriculum of filler lengths; implements :class:`~fam_jax.data.interface.Batches`.

    Fillers of stage s have more than stage_blocks[s - 1] (for s = 0: min_filler_blocks) and up to stage_blocks[s]
    blocks; their lengths are uniform over the multiples of filler_step tokens. All rows of a batch belong to one stage:
    the current one, or with probability 1 - longest_fraction an earlier one. A row is one example.

    The next stage begins when the running exact match of the current one reaches advance_accuracy, or after
    max_stage_steps.

    The stage of a step's batch depends on (seed, step, current stage) only, and example i of a stage on
    (seed, stage, i) only. So :meth:`state` is a handful of numbers, and a process makes no rows but its own.
    """

    def __init__(self, data: DataConfig, spec: BatchSpec):
        """Prepare the stages. The first call of :meth:`next` makes the first examples.

        Args:
          data: vocabulary, lengths, curriculum and loss weights.
          spec: the size of batches, and the seed of everything random.

        Raises:
          UserError: the vocabulary cannot be loaded or cannot express the task, or the number of processes does not
            divide B.
        """
        self.data, self.spec, self._own_rows = data, spec, spec.own_rows
        self.vocabulary: seqio.Vocabulary = load_vocabulary(data.vocabulary)
        self._begin = bos_ids(self.vocabulary, data)
        lower = (data.min_filler_blocks, *data.stage_blocks)
        self._fillers = [
            (low * spec.block_size + data.filler_step, high * spec.block_size)
            for low, high in zip(lower, data.stage_blocks, strict=False)
        ]
        self.stage_tokens = stage_tokens(data, self.vocabulary, spec.block_size)
        self._going_on = GoingOnRows(data, spec, self.vocabulary) if data.questions > 1 else None
        # By stage. Threads make batches ahead and call Python for it; TensorFlow waits for them when it frees the
        # iterators. So free them before the interpreter shuts down, or the program can hang at its end.
        self._batches: dict[int, Iterator[Batch]] = {}
        weakref.finalize(self, self._batches.clear)
        self._start(CurriculumState(examples=[0] * len(data.stage_blocks)))

    @property
    def stage(self) -> int:
        """Return the index of the current stage."""
        return self._position.stage

    @property
    def stage_blocks(self) -> int:
        """Return the longest filler of the current stage, in blocks."""
        return self.data.stage_blocks[self.stage]

    @property
    def on_last_stage(self) -> bool:
        """Return whether there is no stage after the current one."""
        return self.stage + 1 == len(self.data.stage_blocks)

    @property
    def accuracy(self) -> float:
        """Return the running exact match on the current stage; 0 before the first observation."""
        position = self._position
        return position.matched / position.weight if position.weight else 0.0

    @property
    def longest_row(self) -> int:
        """Return the row length of the last stage, in tokens."""
        return self.stage_tokens[-1]

    @property
    def needs_metrics(self) -> bool:
        """Return whether another stage follows and the latest batch belongs to the current one."""
        return not self.on_last_stage and self.batch_stage == self.stage

    def next(self) -> Batch:
        """Return this process's rows of the next batch; `batch_stage` is then the stage they belong to.

        T is `stage_tokens[batch_stage]`. Targets of the answer have weight 1, those before it data.prompt_weight, and
        padding 0.
        """
        position = self._position
        if 0 < self.data.max_stage_steps <= position.stage_steps:
            self._advance()
        stage = self._choose_stage()
        if self._going_on is not None:
            # Writing is learned first, from rows that have the key. Batches of earlier stages go on, too.
            going_on = position.stage_steps if self.on_last_stage else 0
            batch = self._going_on.batch(position.step, self.data.stage_blocks[stage], going_on)
        else:
            if stage not in self._batches:
                self._batches[stage] = self._stage_batches(stage)
            batch = next(self._batches[stage]) | {"start": new_streams(len(self._own_rows))}
        position.examples[stage] += self.spec.batch_size
        position.step += 1
        position.stage_steps += 1
        self.batch_stage = stage
        return batch

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Take in how many rows of the latest batch were answered exactly; this may begin the next stage.

        Args:
          metrics: exact_match is the fraction of the global batch's rows whose whole answer was right.

        Raises:
          ValueError: exact_match is not between 0 and 1.
        """
        if not self.needs_metrics:
            return
        exact_match = float(metrics["exact_match"])
        if not 0 <= exact_match <= 1:
            raise ValueError(f"exact_match: must be between 0 and 1, got {exact_match}")
        position = self._position
        position.reports += 1
        position.matched = ACCURACY_DECAY * position.matched + exact_match
        position.weight = ACCURACY_DECAY * position.weight + 1.0
        if position.reports >= MIN_REPORTS and self.accuracy >= self.data.advance_accuracy:
            self._advance()

    def metrics(self) -> dict[str, float]:
        """Return the longest filler of the current stage."""
        return {"stage_blocks": self.stage_blocks}

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics unchanged: they are about answers."""
        return metrics

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return exact match and filler length, for the progress line."""
        return f"exact match {values['exact_match']:.2f}  filler {values['stage_blocks']} blocks"

    def state(self) -> dict[str, Any]:
        """Return the position, and which examples it refers to, as JSON values."""
        return {"stream": self._identity(), **dataclasses.asdict(self._position)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task or version, or of other examples.
        """
        fields = {"stream", *(field.name for field in dataclasses.fields(CurriculumState))}
        check_state(state, fields, self._identity())
        values = {name: value for name, value in state.items() if name != "stream"}
        self._start(CurriculumState(**{**values, "examples": list(values["examples"])}))

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
        self._position = position
        self.batch_stage = position.stage
        self._batches.clear()

    def _advance(self) -> None:
        if self.on_last_stage:
            return
        position = self._position
        position.stage += 1
        position.stage_steps = position.reports = 0
        position.matched = position.weight = 0.0

    def _choose_stage(self) -> int:
        """Return the stage that the batch of this step is drawn from."""
        position = self._position
        key = random_key("passkey", "stage", self.spec.seed)
        which, earlier = random_words(key, position.step, 2)
        if position.stage == 0 or which < self.data.longest_fraction * 2**64:
            return position.stage
        return earlier % position.stage

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
