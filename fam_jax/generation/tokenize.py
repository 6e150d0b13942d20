"""Convert text of any length to token ids and back piece by piece, with the ids of the whole text."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

from fam_jax.config import UserError
from fam_jax.data.text_files import BEGINNING, BOM, check_encoding

Encode = Callable[[str], Sequence[int]]
# Bytes to read at a time, and characters to encode at a time.
BYTES = 1 << 18
PIECE = 1 << 16
# Characters on either side of a border that decide whether it is safe.
CONTEXT = 256
# Borders to try before a piece ends just anywhere.
ATTEMPTS = 32

# Before white space, where the pieces of most vocabularies end.
BORDER = re.compile(r"(?<=\S)(?=\s)")


def read_text(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the UTF-8 text of a binary file as it is read, without a byte-order mark at its head.

    Raises:
      UserError: the file is not UTF-8 (the message names the byte or the encoding), is empty, or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, at_head = 0, True
    while True:
        try:
            content = file.read(BYTES)
        except OSError as error:
            raise UserError(
                f"{name}: cannot be read ({error.strerror}); give a file of UTF-8 text"
            ) from error
        if not content and before == 0:
            raise UserError(f"{name}: is empty; give at least one character to read")
        if not before:
            check_encoding(content[:BEGINNING], name)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: is not valid UTF-8 at byte {before - held + error.start} "
                f"(0x{error.object[error.start]:02x}: {error.reason}); convert it to UTF-8"
            ) from error
        if at_head and text:
            text, at_head = text.removeprefix(BOM), False
        yield text
        if not content:
            return
        before += len(content)


def check_unicode(text: str, name: str) -> None:
    """Raise :class:`UserError` if a text holds half of a surrogate pair, which no vocabulary can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{name}: is not valid Unicode at character {error.start} ({half}, half of a surrogate pair); write it as "
            "UTF-8"
        ) from error


def encode_pieces(
    encode: Encode, texts: Iterable[str], *, piece: int = PIECE, context: int = CONTEXT
) -> Iterator[list[int]]:
    """Yield the token ids of `"".join(texts)`, for about `piece` characters at a time.

    A vocabulary may put a mark before a text, merge spaces and so on, so pieces that are encoded alone would differ
    from the whole. Therefore each piece is encoded behind the end of the one before it, whose ids are then removed,
    and it ends where its ids do not depend on what follows. If a text has no such border (no white space for thousands
    of characters), a piece may end within a token.
    """
    behind, text = "", ""
    for more in texts:
        text += more
        while len(text) >= piece + context:
            end = _safe_border(encode, text, piece, context)
            yield encode_behind(encode, behind, text[:end])
            behind, text = last_words(behind + text[:end], context), text[end:]
    if text:
        yield encode_behind(encode, behind, text)


def encode_behind(encode: Encode, behind: str, text: str) -> list[int]:
    """Return the ids of `text` where it follows `behind`, which should end before white space."""
    return [*encode(behind + text)][len(encode(behind)) :] if behind else [*encode(text)]


def _safe_border(encode: Encode, text: str, piece: int, context: int) -> int:
    """Return the last place up to `piece` where the text after it does not change the ids before it."""
    borders = [match.start() for match in BORDER.finditer(text, max(0, piece // 2), piece + 1)]
    for border in [*borders[: -ATTEMPTS - 1 : -1], *range(piece, max(0, piece - ATTEMPTS), -1)]:
        before = last_words(text[:border], context)
        ids = [*encode(before)]
        if ids == [*encode(before + text[border : border + context])][: len(ids)]:
            return border
    return piece


def last_border(encode: Encode, text: str) -> int:
    """Return the last place before white space where the text after it does not change the ids before it; else 0."""
    for match in reversed([*BORDER.finditer(text)]):
        ids = [*encode(text[: match.start()])]
        if ids == [*encode(text)][: len(ids)]:
            return match.start()
    return 0


def last_words(text: str, context: int) -> str:
    """Return about the last `context` characters, from the start of a word if they have one."""
    end = text[-context:]
    if len(end) < len(text):
        first = BORDER.search(end, 0, len(end) - 1)
        end = end[first.start() :] if first else end
    return end


class Detokenizer:
    """Decode generated ids as they come. A character of several ids waits until it is complete."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        # Ids up to `passed_on` are decoded. Those from `context` on are decoded again with what follows, which decides
        # about spaces between them.
        self._context = self._passed_on = 0

    def add(self, ids: Iterable[int]) -> str:
        """Add ids; return the text that they complete."""
        self._ids.extend(ids)
        return self._text(hold=True)

    def finish(self) -> str:
        """Return the rest of the text, complete or not."""
        return self._text(hold=False)

    def _text(self, *, hold: bool) -> str:
        known = self._decode(self._ids[self._context : self._passed_on])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(known) or (hold and text.endswith("\N{REPLACEMENT CHARACTER}")):
            return ""
        self._context, self._passed_on = self._passed_on, len(self._ids)
        return text[len(known) :]
