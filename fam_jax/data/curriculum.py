"""Training batches of the PassKey curriculum, resumable at any step and shardable over processes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from fam_jax.config import DataConfig, UserError
from fam_jax.data.bos import bos_ids
from fam_jax.data.passkey import examples_at, make_template, passkey_task, random_key
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.vocabulary import load_vocabulary

Batch = dict[str, np.ndarray]

ACCURACY_DECAY = 0.9  # of the running exact match: it looks back about 10 batches
MIN_REPORTS = 10  # of batches of the current stage, before its running exact match counts
PREFETCH = 2  # batches made ahead, per stage


@dataclasses.dataclass
class Progress:
    """All that decides which batches are still to come; the rest is config."""

    step: int = 0  # batches handed out
    stage: int = 0
    stage_steps: int = 0  # batches handed out since the stage began
    examples: list[int] = dataclasses.field(default_factory=list)  # per stage: drawn by all processes
    reports: int = 0  # in this stage
    matched: float = 0.0  # decayed sum of the reported exact match
    weight: float = 0.0  # decayed count of reports: matched / weight is the running exact match


class PasskeyStream:
    """Endless batches of a curriculum of filler lengths.

    Stage s has fillers of more than stage_blocks[s - 1] (for s = 0: min_filler_blocks) and up to
    stage_blocks[s] blocks, uniform over the multiples of filler_step tokens. Each batch holds examples of one
    stage: the current one, or with probability 1 - longest_fraction one of the earlier stages. A row is one
    example.

    Which stage a step draws from depends on (seed, step, current stage) only, and example i of a stage on
    (seed, stage, i) only; so :meth:`state` is a handful of numbers, and every process of a group makes just
    its own rows. All processes must make the same calls to :meth:`report` with the same values.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ):
        """Prepares the stages; the first examples are made by the first :meth:`next_batch`.

        Args:
          data: lengths, curriculum and loss weights.
          block_size: C, tokens.
          batch_size: B, rows of the global batch.
          seed: of everything random.
          shard: (index, count) of this process; it makes rows [index * B / count, (index + 1) * B / count).

        Raises:
          UserError: the vocabulary cannot be loaded or cannot write the task, or count does not divide B.
        """
        self.shard_index, self.shard_count = shard
        if batch_size % self.shard_count:
            raise UserError(f"batch_size {batch_size} is not divisible by the {self.shard_count} processes")
        self.data = data
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.vocabulary: seqio.Vocabulary = load_vocabulary(data.vocabulary)
        self._begin = bos_ids(self.vocabulary, data)
        template = make_template(self.vocabulary, self._begin)
        lower = (data.min_filler_blocks, *data.stage_blocks)
        self._fillers = [
            (low * block_size + data.filler_step, high * block_size)
            for low, high in zip(lower, data.stage_blocks, strict=False)
        ]
        # A sequence of n tokens has n - 1 inputs.
        longest = (template.longest_example(high, data.digits) - 1 for _, high in self._fillers)
        self.stage_tokens = tuple(-(-tokens // block_size) * block_size for tokens in longest)
        self.batch_stage = 0
        self._start(Progress(examples=[0] * len(data.stage_blocks)))

    @property
    def stage(self) -> int:
        """Index of the current stage."""
        return self._progress.stage

    @property
    def stage_blocks(self) -> int:
        """Longest filler of the current stage, in blocks."""
        return self.data.stage_blocks[self.stage]

    @property
    def advancing(self) -> bool:
        """Whether there are stages to come, which reports may bring."""
        return self.stage + 1 < len(self.data.stage_blocks)

    @property
    def accuracy(self) -> float:
        """Running exact match on the current stage; 0 before the first report."""
        progress = self._progress
        return progress.matched / progress.weight if progress.weight else 0.0

    def next_batch(self) -> Batch:
        """This process's rows of the next global batch; `batch_stage` is then the stage they come from.

        Returns:
          inputs, targets (B / count, T) int32; weights (B / count, T) float32: 1 on the answer, prompt_weight
          before it, 0 on padding; answer (B / count, T) bool: the targets that belong to the answer.
          T is `stage_tokens[batch_stage]`.
        """
        progress = self._progress
        if 0 < self.data.max_stage_steps <= progress.stage_steps:
            self._advance()
        stage = self._choose_stage()
        if stage not in self._batches:
            self._batches[stage] = self._stage_batches(stage)
        batch = next(self._batches[stage])
        progress.examples[stage] += self.batch_size
        progress.step += 1
        progress.stage_steps += 1
        self.batch_stage = stage
        return batch

    def report(self, exact_match: float, batch_stage: int | None = None) -> None:
        """Tells how well a batch was answered; may begin the next stage.

        Reports may come late, but those still missing when :meth:`state` is taken are missing after a resume.

        Args:
          exact_match: fraction of the global batch's rows whose whole answer was right, 0 to 1.
          batch_stage: value of `batch_stage` when that batch came; None: it was the latest. Only batches of
            the current stage count.

        Raises:
          ValueError: exact_match is not within 0 to 1.
        """
        if not 0 <= exact_match <= 1:
            raise ValueError(f"exact_match: expected 0 to 1, got {exact_match}")
        progress = self._progress
        if (self.batch_stage if batch_stage is None else batch_stage) != progress.stage:
            return
        progress.reports += 1
        progress.matched = ACCURACY_DECAY * progress.matched + float(exact_match)
        progress.weight = ACCURACY_DECAY * progress.weight + 1.0
        if progress.reports >= MIN_REPORTS and self.accuracy >= self.data.advance_accuracy:
            self._advance()

    def metrics(self) -> dict[str, float]:
        """What the log says of the data."""
        return {"stage_blocks": self.stage_blocks}

    def note(self, values: dict[str, Any]) -> str:
        """Part of the line that reports a step's metrics."""
        return f"exact match {values['exact_match']:.2f}  filler {values['stage_blocks']} blocks"

    def state(self) -> dict[str, Any]:
        """JSON-able; a stream with it restored continues with the very batches that this one would give.

        It is the same in all processes and may be restored with another number of them.
        """
        return {"stream": self._identity(), **dataclasses.asdict(self._progress)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state`.

        Raises:
          UserError: the state is of another version, or belongs to a stream of other examples.
        """
        fields = {"stream", *(field.name for field in dataclasses.fields(Progress))}
        if not isinstance(state, dict) or set(state) != fields:
            raise UserError(
                f"data state: expected the fields {', '.join(sorted(fields))}; it is of another version"
            )
        for name, value in self._identity().items():
            saved = state["stream"].get(name)
            if saved != value:
                raise UserError(
                    f"data state: {name} was {saved} when it was saved and is {value} now; "
                    "resume with the config of the run"
                )
        values = {name: value for name, value in state.items() if name != "stream"}
        self._start(Progress(**{**values, "examples": list(values["examples"])}))

    def _identity(self) -> dict[str, Any]:
        """What must agree for a state to mean the same examples."""
        data = self.data
        return {
            "seed": self.seed,
            "block_size": self.block_size,
            "digits": data.digits,
            "min_filler_blocks": data.min_filler_blocks,
            "filler_step": data.filler_step,
            "stage_blocks": list(data.stage_blocks),
        }

    def _start(self, progress: Progress) -> None:
        self._progress = progress
        self.batch_stage = progress.stage
        self._batches: dict[int, Iterator[Batch]] = {}

    def _advance(self) -> None:
        progress = self._progress
        if progress.stage + 1 == len(self.data.stage_blocks):
            return
        progress.stage += 1
        progress.stage_steps = progress.reports = 0
        progress.matched = progress.weight = 0.0

    def _choose_stage(self) -> int:
        """The stage that the batch of this step is drawn from."""
        progress = self._progress
        generator = np.random.Philox(key=random_key("passkey", "stage", self.seed), counter=progress.step)
        which, earlier = (int(word) for word in generator.random_raw(2))
        if progress.stage == 0 or which < self.data.longest_fraction * 2**64:
            return progress.stage
        return earlier % progress.stage

    def _stage_batches(self, stage: int) -> Iterator[Batch]:
        """Batches of one stage from the first example not yet drawn, made ahead by a single thread."""
        task = passkey_task(
            f"passkey_stage_{stage}",
            self.vocabulary,
            self._fillers[stage],
            self.seed,
            self.data.digits,
            filler_step=self.data.filler_step,
            begin=self._begin,
        )
        rows = self.batch_size // self.shard_count
        first = self._progress.examples[stage] + self.shard_index * rows

        def example_index(k: tf.Tensor) -> tf.Tensor:
            return first + k // rows * self.batch_size + k % rows

        indices = tf.data.Dataset.range(tf.int64.max // self.batch_size).map(example_index)
        dataset = examples_at(task, "train", indices).map(self._to_row)
        shapes = {name: [self.stage_tokens[stage]] for name in dataset.element_spec}
        dataset = dataset.padded_batch(rows, shapes, drop_remainder=True)
        options = tf.data.Options()
        options.autotune.enabled = False  # it would start threads that training on a CPU needs
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        return dataset.prefetch(PREFETCH).with_options(options).as_numpy_iterator()

    def _to_row(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One example as inputs, targets, weights, answer, each (n - 1,)."""
        tokens = tf.concat([example["inputs"], example["targets"]], axis=0)
        # Target j is token j + 1; the first answer token is the one after the prompt.
        answer = tf.range(1, tf.size(tokens)) >= tf.size(example["inputs"])
        weights = tf.where(answer, 1.0, self.data.prompt_weight)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights, "answer": answer}
