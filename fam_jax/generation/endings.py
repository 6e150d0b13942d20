"""What ends a generated text: end tokens, stop strings, and special tokens given as stop strings."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fam_jax.config import UserError
from fam_jax.data.vocabulary import special_token_id
from fam_jax.generation.tokenize import Detokenizer

# `ended_by` of a text that an end token ended, and of one that reached its largest number of tokens.
END, LENGTH = "end", "length"


class Endings:
    """Tokens and strings that end a text. None of them belongs to the text."""

    def __init__(self, vocabulary: Any, end_ids: Iterable[int], stop: Sequence[str]):
        """Take the end tokens of a model, and stop strings.

        A stop string that is the text of a special token stands for that token too: special tokens are not part of the
        decoded text, where a string could be found.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError("stop: must not be an empty string")
        self.strings = tuple(stop)
        special = {special_token_id(vocabulary, text): text for text in stop}
        self._names = dict.fromkeys(end_ids, END) | {
            token: text for token, text in special.items() if token is not None
        }

    @property
    def tokens(self) -> list[int]:
        """Return the ids that end a text."""
        return sorted(self._names)

    def name(self, token: int) -> str:
        """Return what a token that ends a text is called in `ended_by`: "end", or the stop string."""
        return self._names[token]


class TextWriter:
    """Decode generated tokens, look for stop strings, and pass on what cannot be the start of one."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        endings: Endings,
        on_text: Callable[[str], None] | None = None,
    ):
        """Take a vocabulary's `decode`, and a function to call with the text as it comes."""
        self._detokenizer, self._endings, self._on_text = Detokenizer(decode), endings, on_text
        self._text, self._passed_on = "", 0
        # Why the text ended; None: it goes on.
        self.ended_by: str | None = None

    def add(self, tokens: Sequence[int], *, stopped: bool = False) -> int:
        """Add the tokens of a row until a stop string is complete.

        Args:
          tokens: generated after those added before.
          stopped: whether the last one is an end token.

        Returns:
          How many tokens belong to the text and what ended it; the others come after a stop string.
        """
        for count, token in enumerate(tokens, 1):
            if stopped and count == len(tokens):
                self._end(self._endings.name(token))
                break
            self._text += self._detokenizer.add([token])
            if self._found_stop():
                return count
        self._pass_on(len(self._text) - self._held_back())
        return len(tokens)

    def finish(self) -> str:
        """Return the whole text, after passing on the rest of it."""
        if self.ended_by is None:
            self._end(LENGTH)
        self._pass_on(len(self._text))
        return self._text

    def _end(self, by: str) -> None:
        self._text += self._detokenizer.finish()
        if not self._found_stop():
            self.ended_by = by

    def _found_stop(self) -> bool:
        found = [(self._text.find(stop, self._passed_on), stop) for stop in self._endings.strings]
        places = [(place, stop) for place, stop in found if place >= 0]
        if not places:
            return False
        place, self.ended_by = min(places)
        self._text = self._text[:place]
        self._pass_on(place)
        return True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the start of a stop string."""
        if self.ended_by is not None:
            return 0
        return max((_partial_stop(self._text, stop) for stop in self._endings.strings), default=0)

    def _pass_on(self, until: int) -> None:
        if self._on_text is not None and until > self._passed_on:
            self._on_text(self._text[self._passed_on : until])
        self._passed_on = max(self._passed_on, until)


def _partial_stop(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the start of `stop`."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
