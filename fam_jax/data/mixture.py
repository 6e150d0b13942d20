"""Training batches of text and of PassKey in turns: what a model knew is kept while it learns to remember.

Batches are mixed, and not examples within a row: a row of PassKey is one whole example, whose key and question packing
would cut apart, and its curriculum goes on beside the text.
"""

from typing import Any

import numpy as np

from fam_jax.config import UserError
from fam_jax.data.curriculum import PasskeyStream
from fam_jax.data.packing import Batch, PackedStream
from fam_jax.data.passkey import random_key


class MixedStream:
    """Endless batches, each of one of two streams; which of them depends on the seed, the step and the stage only.

    Few steps may suffice to learn what memory is for, and many be needed to keep the rest: the fraction may change with
    the curriculum's last stage.

    Rows of the two differ in length, so a training step is compiled for each. Both streams keep their own state; a
    resumed mixture continues with the very batches that were to come.
    """

    def __init__(
        self,
        text: PackedStream,
        passkey: PasskeyStream,
        *,
        passkey_fraction: float,
        last_stage_fraction: float = 0.0,
        seed: int,
    ):
        """Takes the streams as they stand.

        Args:
          text: gives the other batches.
          passkey: gives a fraction of them.
          passkey_fraction: probability that a batch is PassKey's.
          last_stage_fraction: the same from the last stage of the curriculum on; 0 = no other.
          seed: of the choice.
        """
        self.text, self.passkey = text, passkey
        self.vocabulary = text.vocabulary
        self._fraction = passkey_fraction
        self._last_fraction = last_stage_fraction or passkey_fraction
        self._key = random_key("mixture", seed)
        self._step = 0
        self._is_passkey = False  # the latest batch

    @property
    def advancing(self) -> bool:
        """Whether a report of the latest batch may bring the next stage of the curriculum."""
        return self._is_passkey and self.passkey.advancing

    def report(self, exact_match: float) -> None:
        """Tells how well the latest batch was answered; see :meth:`PasskeyStream.report`."""
        if self._is_passkey:
            self.passkey.report(exact_match)

    def metrics(self) -> dict[str, float]:
        """What the log says of the data; the step's loss is that of the latest batch."""
        return {"passkey_batch": float(self._is_passkey), **self.text.metrics(), **self.passkey.metrics()}

    def note(self, values: dict[str, Any]) -> str:
        """Part of the line that reports a step's metrics."""
        return (
            f"passkey  {self.passkey.note(values)}" if self._is_passkey else f"text  {self.text.note(values)}"
        )

    def next_batch(self) -> Batch:
        """This process's rows of the next global batch, as of the stream that it comes from."""
        draw = np.random.Philox(key=self._key, counter=self._step).random_raw()
        fraction = self._fraction if self.passkey.advancing else self._last_fraction
        self._is_passkey = int(draw) < fraction * 2**64
        self._step += 1
        return self.passkey.next_batch() if self._is_passkey else self.text.next_batch()

    def state(self) -> dict[str, Any]:
        """JSON-able; a stream with it restored continues with the very batches that this one would give."""
        return {"step": self._step, "text": self.text.state(), "passkey": self.passkey.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state`.

        Raises:
          UserError: the state is of another task or version, or of streams of other examples.
        """
        if not isinstance(state, dict) or set(state) != {"step", "text", "passkey"}:
            raise UserError(
                "data state: expected the fields passkey, step, text; it is of another task or version"
            )
        self.text.restore(state["text"])
        self.passkey.restore(state["passkey"])
        self._step, self._is_passkey = state["step"], False
