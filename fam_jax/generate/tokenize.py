"""Text of any length to token ids and back, a piece at a time; the ids are those of the whole."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

from fam_jax.config import UserError

Encode = Callable[[str], Sequence[int]]
BYTES = 1 << 18  # that are read at a time
PIECE = 1 << 16  # characters that are encoded at a time
CONTEXT = 256  # characters on either side of a border that decide whether it is safe
ATTEMPTS = 32  # borders that are tried before a piece ends just anywhere

# Before white space: there, pieces of most vocabularies end.
BORDER = re.compile(r"(?<=\S)(?=\s)")


def read_text(file: BinaryIO, name: str) -> Iterator[str]:
    """The UTF-8 text of a binary file, as it is read.

    Raises:
      UserError: a byte is no UTF-8 (the message names it), or the file is empty or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    while True:
        try:
            content = file.read(BYTES)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from error
        if not content and before == 0:
            raise UserError(f"{name}: is empty; give at least one character to read")
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: is not valid UTF-8 at byte {before - held + error.start} "
                f"(0x{error.object[error.start]:02x}: {error.reason}); convert it to UTF-8"
            ) from error
        yield text
        if not content:
            return
        before += len(content)


def encode_pieces(
    encode: Encode, texts: Iterable[str], *, piece: int = PIECE, context: int = CONTEXT
) -> Iterator[list[int]]:
    """Token ids that together are `encode("".join(texts))`, of about `piece` characters at a time.

    A vocabulary may put a mark before a text, merge spaces and so on, so that pieces encoded each by itself would
    differ from the whole. Each is therefore encoded behind the end of the one before, whose ids are then taken away,
    and ends where those ids do not depend on what follows. Where a text offers no such border (no white space for
    thousands of characters), a piece may end within a token.
    """
    behind, text = "", ""
    for more in texts:
        text += more
        while len(text) >= piece + context:
            end = _safe_border(encode, text, piece, context)
            yield _continuation(encode, behind, text[:end])
            behind, text = _last_words(behind + text[:end], context), text[end:]
    if text:
        yield _continuation(encode, behind, text)


def _continuation(encode: Encode, behind: str, text: str) -> list[int]:
    """Ids of `text` where it follows `behind`."""
    return [*encode(behind + text)][len(encode(behind)) :] if behind else [*encode(text)]


def _safe_border(encode: Encode, text: str, piece: int, context: int) -> int:
    """The last place up to `piece` at which what follows does not change the ids of what is before."""
    borders = [match.start() for match in BORDER.finditer(text, max(0, piece // 2), piece + 1)]
    for border in [*borders[: -ATTEMPTS - 1 : -1], *range(piece, max(0, piece - ATTEMPTS), -1)]:
        before = _last_words(text[:border], context)
        ids = [*encode(before)]
        if ids == [*encode(before + text[border : border + context])][: len(ids)]:
            return border
    return piece


def _last_words(text: str, context: int) -> str:
    """About the last `context` characters, from the beginning of a word if there is one among them."""
    end = text[-context:]
    if len(end) < len(text):
        first = BORDER.search(end, 0, len(end) - 1)
        end = end[first.start() :] if first else end
    return end


class Detokenizer:
    """Text of generated ids as they come; letters of several ids wait until they are whole."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._context = self._told = 0  # ids from `context` to `told` are decoded again, for their spaces

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        self._ids.extend(ids)
        return self._text(hold=True)

    def finish(self) -> str:
        """What is left, whole or not."""
        return self._text(hold=False)

    def _text(self, *, hold: bool) -> str:
        known = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(known) or (hold and text.endswith("\N{REPLACEMENT CHARACTER}")):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return text[len(known) :]
