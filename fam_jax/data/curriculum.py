"""Training batches whose texts get longer as the model learns; resumable at any step."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fam_jax.config import DataConfig
from fam_jax.data.interface import Batch, BatchSpec, check_state
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.randomness import random_key, random_words

# Decay of the running exact match, which so averages over about 10 batches.
ACCURACY_DECAY = 0.9
# Batches of a stage to observe before its running exact match can end it.
MIN_REPORTS = 10


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


class Curriculum(abc.ABC):
    """Endless batches of a curriculum of lengths; implements :class:`~fam_jax.data.interface.Batches`.

    All rows of a batch belong to one stage: the current one, or with probability 1 - longest_fraction an earlier one. A
    row is one example.

    The next stage begins when the running exact match of the current one reaches advance_accuracy, or after
    max_stage_steps.

    The stage of a step's batch depends on (seed, step, current stage) only, and example i of a stage on
    (seed, stage, i) only. So :meth:`state` is a handful of numbers, and a process makes no rows but its own.
    """

    # Names the random numbers.
    name: ClassVar[str]
    # What the lengths of stages measure, for the progress line.
    length_of: str

    def __init__(
        self, data: DataConfig, spec: BatchSpec, vocabulary: seqio.Vocabulary, stage_tokens: tuple[int, ...]
    ):
        """Begin at the first stage.

        Args:
          data: the stages, when they end, and loss weights.
          spec: the size of batches, and the seed of everything random.
          vocabulary: of the token ids.
          stage_tokens: T of each stage.

        Raises:
          UserError: the number of processes does not divide B.
        """
        self.data, self.spec, self._own_rows = data, spec, spec.own_rows
        self.vocabulary, self.stage_tokens = vocabulary, stage_tokens
        self._start(CurriculumState(examples=[0] * len(data.stage_blocks)))

    @abc.abstractmethod
    def _make(self, stage: int) -> Batch:
        """Return this process's rows of the next batch, which is drawn from a stage."""

    @abc.abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return what the examples of a position depend on."""

    @property
    def stage(self) -> int:
        """Return the index of the current stage."""
        return self._position.stage

    @property
    def stage_blocks(self) -> int:
        """Return the longest text of the current stage, in blocks."""
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
        """Return whether the latest batch belongs to a stage that its exact match may end."""
        ends = not self.on_last_stage and self.data.advance_accuracy > 0
        return ends and self.batch_stage == self.stage

    def next(self) -> Batch:
        """Return this process's rows of the next batch; `batch_stage` is then the stage they belong to.

        T is `stage_tokens[batch_stage]`. Targets of the answer have weight 1, those before it data.prompt_weight, and
        padding 0.
        """
        position = self._position
        if 0 < self.data.max_stage_steps <= position.stage_steps:
            self._advance()
        stage = self._choose_stage()
        batch = self._make(stage)
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
        """Return the longest text of the current stage, in blocks."""
        return {"stage_blocks": self.stage_blocks}

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics unchanged: they are about answers."""
        return metrics

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return exact match and length, for the progress line."""
        return f"exact match {values['exact_match']:.2f}  {self.length_of} {values['stage_blocks']} blocks"

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

    def _start(self, position: CurriculumState) -> None:
        self._position = position
        self.batch_stage = position.stage

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
        key = random_key(self.name, "stage", self.spec.seed)
        which, earlier = random_words(key, position.step, 2)
        if position.stage == 0 or which < self.data.longest_fraction * 2**64:
            return position.stage
        return earlier % position.stage
