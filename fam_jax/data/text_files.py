"""Read text files: decode UTF-8, and take the documents out of JSON, JSON Lines, Parquet and compressed files.

Imports no TensorFlow.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

from fam_jax.config import UserError
from fam_jax.config.strict_json import parse_json

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
# Byte-order marks of other encodings. The mark of UTF-32 begins with that of UTF-16.
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Bytes at the beginning of a file that tell whether it is UTF-8.
BEGINNING = 1 << 16
# Text of other encodings, and binary data, has more zero bytes than this fraction. UTF-16 has them at spaces, at least.
ZEROS = 0.01

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
GZIP = ".gz"
JSON = ".json"
PARQUET = ".parquet"
# Files that hold documents, but are not read. Some of them are valid UTF-8, and would pass as prose.
NOT_READ = (
    ".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".tfrecord", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z",
    ".tar", ".tgz", ".pdf", ".doc", ".docx", ".rtf", ".odt", ".epub", ".ipynb", ".xls", ".xlsx", ".npy", ".npz", ".pkl",
)  # fmt: skip


class TextError(UserError):
    """A file is not UTF-8 text, or does not hold documents in the format that its name says."""


def decode_text(raw: bytes, where: str) -> str:
    """Decode a file of UTF-8 text; leave out a byte-order mark at its beginning.

    Args:
      raw: content of the file.
      where: what the text comes from, for the message.

    Raises:
      TextError: it is text of another encoding, or no text.
    """
    check_encoding(raw[:BEGINNING], where)
    try:
        return raw.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); "
            "convert the file or leave it out"
        ) from error


def check_encoding(beginning: bytes, where: str) -> None:
    """Check the first :data:`BEGINNING` bytes of a file for signs of another encoding than UTF-8.

    Raises:
      TextError: they begin with the byte-order mark of UTF-16 or UTF-32, or hold as many zero bytes as UTF-16.
    """
    for mark, encoding in MARKS.items():
        if beginning.startswith(mark):
            raise TextError(f"{where}: is {encoding}, by its byte-order mark; convert it to UTF-8")
    if beginning.count(0) > ZEROS * len(beginning):
        raise TextError(
            f"{where}: holds zero bytes, as UTF-16 and binary files do; convert it to UTF-8 or leave it out"
        )


def is_plain(name: str) -> bool:
    """Return whether a file is read as it is, as one text: its name says neither JSON, Parquet nor compressed."""
    return not name.lower().endswith((*JSON_LINES, JSON, GZIP, PARQUET, *NOT_READ))


def begins_as_json_lines(text: str) -> bool:
    """Return whether the first line of a text is a JSON object with a text, as in JSON Lines under another ending."""
    line = text.lstrip().partition("\n")[0]
    try:
        value = parse_json(line) if line.startswith("{") else None
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def is_json_lines(name: str) -> bool:
    """Return whether a file is uncompressed JSON Lines, by its name."""
    return name.lower().endswith(JSON_LINES)


def packed_documents(path: epath.Path, where: str) -> Iterator[str]:
    """Yield the documents of a compressed file, a JSON file or a Parquet file.

    Args:
      path: the file; its name says the format.
      where: the field or flag that names the file, and the path, for messages.

    Raises:
      OSError: the file cannot be read.
      TextError: the format is not supported, the file is damaged, or a row has no text.
    """
    name = path.name.lower()
    if name.endswith(NOT_READ):
        raise TextError(
            f"{where}: {name[name.rindex('.') :]} files are not read; convert it to JSON Lines, "
            'a line {"text": "..."} for each document, under a name that ends in .jsonl'
        )
    if name.endswith(PARQUET):
        with path.open("rb") as file:
            yield from _parquet_documents(file, where)
        return
    raw = path.read_bytes()
    if name.endswith(GZIP):
        raw, name = _decompressed(raw, where), name.removesuffix(GZIP)
    if name.endswith(GZIP) or (not is_plain(name) and not name.endswith((*JSON_LINES, JSON))):
        raise TextError(f"{where}: is not read once decompressed; decompress it, or convert it to .jsonl.gz")
    text = decode_text(raw, where)
    if is_json_lines(name):
        for number, line in enumerate(raw.splitlines(), 1):
            if line.strip():
                yield json_line(line, f"{where}: line {number}")
    elif name.endswith(JSON):
        yield from _json_documents(text, raw, where)
    else:
        yield text


def json_line(line: bytes, where: str) -> str:
    """Return the text of a line of JSON Lines, an object with a string under "text".

    Args:
      line: UTF-8.
      where: the file and the line, for messages.

    Raises:
      TextError: the line is not such an object, or its text is not valid.
    """
    text = decode_text(line, where)
    try:
        return _text_of(parse_json(text), where)
    except (ValueError, RecursionError) as error:
        raise TextError(
            f'{where}: expected an object with a text under "text", but it is not valid JSON; '
            "correct or remove the line"
        ) from error


def _json_documents(text: str, raw: bytes, where: str) -> Iterator[str]:
    """Yield the texts of a .json file: an object, an array of objects, or JSON Lines."""
    try:
        found = parse_json(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(raw.splitlines(), 1):
            if line.strip():
                yield json_line(line, f"{where}: line {number}")
        return
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, 1):
        yield _text_of(row, f"{where}: entry {number}")


def _parquet_documents(file: BinaryIO, where: str) -> Iterator[str]:
    """Yield the column "text" of a Parquet file."""

    def choose(names: list[str]) -> list[str]:
        if "text" not in names:
            _no_text(names, where)
        return ["text"]

    for number, row in enumerate(parquet_rows(file, where, choose), 1):
        yield _text_of(row, f"{where}: row {number}")


def parquet_rows(
    file: BinaryIO, where: str, choose: Callable[[list[str]], list[str]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, as values by column.

    Args:
      file: the open file.
      where: the field or flag that names the file, and the path, for messages.
      choose: returns the columns to read, from the names of all.

    Raises:
      TextError: the file is damaged or not a Parquet file, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TextError(
            f"{where}: reading Parquet needs pyarrow; install it, or convert the file to .jsonl"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = choose(table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextError(f"{where}: is damaged or not a Parquet file; leave it out") from error


def _text_of(row: Any, where: str) -> str:
    """Return the text of an object that was read from JSON."""
    if not isinstance(row, dict):
        raise TextError(
            f'{where}: expected an object with a text under "text", got {type(row).__name__}; '
            "correct or remove it"
        )
    if "text" not in row:
        _no_text([*row], where)
    text = row["text"]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise TextError(
            f'{where}: expected an object with a text under "text", but "text" is {found}; correct or remove it'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TextError(
            f'{where}: expected an object with a text under "text", but "text" has half a surrogate pair, {half}, at '
            f"character {error.start}; correct or remove it"
        ) from error
    return text


def _no_text(names: list[str], where: str) -> None:
    """Raise :class:`TextError` for an object without a text."""
    fields = ", ".join(names) if names else "no fields"
    raise TextError(
        f'{where}: expected an object with a text under "text", got {fields:.200}; write each document as '
        '{"text": "..."}, or, if these are prompts and answers or chats, set data.task=instructions'
    )


def _decompressed(raw: bytes, where: str) -> bytes:
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(
            f"{where}: is damaged or not a gzip file; compress it again or leave it out"
        ) from error
