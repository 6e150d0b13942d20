"""Files of data, metrics, results and configs, damaged and hostile."""

import gzip
import io
import json
import pathlib
from typing import Any

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from fam_jax.checkpoint import read_config_file
from fam_jax.checkpoint.aside import note_of_gone_step
from fam_jax.checkpoint.folder import SEAL, json_digest
from fam_jax.config import Config, default_config, resolve
from fam_jax.config.overrides import Override, apply_overrides
from fam_jax.config.strict_json import dump_json
from fam_jax.data.documents import Documents, find_files
from fam_jax.data.records import Records
from fam_jax.evaluation.record import read_evaluation
from fam_jax.evaluation.rows import _file_rows
from fam_jax.training.going_back import step_to_restore
from fam_jax.training.metrics import _drop_later_lines, _has_evaluation
from tests.fuzz.hostile import SCALARS, VALUES, changed_json, damaged, examples, reads

ROWS: list[Any] = [
    {"text": "one two", "prompt": "a", "answer": "b", "n": 1},
    {
        "text": "drei \u4e09",
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    },
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet() -> bytes:
    pyarrow, written = pytest.importorskip("pyarrow"), io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": ["one", "two"] * 9}), written)
    return written.getvalue()


FILES = {
    "a.txt": b"one\ntwo \xe4\xb8\x89",
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.parquet": parquet(),
}


def write(folder: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
    (folder / name).write_bytes(content)
    return folder / name


def read_data(path: pathlib.Path) -> None:
    """Read a file with every reader of data."""

    def documents() -> None:
        found = Documents(find_files([str(path)], (".txt",), "field"), "field")
        for number in range(len(found)):
            found[number].encode()

    reads(documents)
    if not path.name.endswith(".txt"):
        for skip in (False, True):
            reads(lambda skip=skip: [*map(json.dumps, Records([epath.Path(path)], "field", skip_bad=skip))])
        reads(lambda: [*_file_rows(path)])


@pytest.mark.parametrize("name", FILES)
@examples(15)
@given(data=st.data())
def test_damaged_files_of_data(name: str, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    read_data(write(tmp_path, name, data.draw(damaged(FILES[name]))))


@examples(15)
@given(rows=changed_json(ROWS), form=st.sampled_from(["a.jsonl", "a.json", "a.json.gz"]))
def test_rows_of_anything(rows: Any, form: str, tmp_path: pathlib.Path) -> None:
    content = json.dumps(rows).encode()
    if form == "a.jsonl" and isinstance(rows, list):
        content = b"\n".join(json.dumps(row).encode() for row in rows)
    read_data(write(tmp_path, form, gzip.compress(content) if form.endswith("gz") else content))


@examples(20)
@given(data=st.data())
def test_metrics_of_anything(data: st.DataObject, tmp_path: pathlib.Path) -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 3, "evaluation": {"a": {"b": 1}}}, {"step": 4, "loss": 0.5}]
    whole = b"".join(json.dumps(data.draw(changed_json(line))).encode() + b"\n" for line in lines)
    path = write(tmp_path, "metrics.jsonl", data.draw(st.just(whole) | damaged(whole)))
    kept = _drop_later_lines(path, 3)
    _has_evaluation(kept, 3)
    assert b"".join(kept) == path.read_bytes()
    assert _drop_later_lines(path, 3) == kept


@examples(20)
@given(value=changed_json({"step": 3, "restore_step": 3}), bad=st.booleans())
def test_small_files_of_a_run(value: Any, bad: bool, tmp_path: pathlib.Path) -> None:
    for name in ("newest_step.json", "gone_back.json"):
        write(tmp_path, name, b"[" * 100_000 if bad else json.dumps(value).encode())
    folder = epath.Path(tmp_path)
    assert isinstance(note_of_gone_step(folder, [1]), str)
    step_to_restore(folder, 3)


CONFIG: dict[str, Any] = json.loads(json.dumps(default_config().to_dict()))


@pytest.mark.parametrize("sealed", [True, False])
@examples(25)
@given(data=st.data())
def test_the_config_of_a_run_of_anything(sealed: bool, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    """With the right checksum, it is what somebody wrote on purpose."""
    value = data.draw(changed_json({"format": 2, "history": [{"step": 1}], **CONFIG}))
    if sealed and isinstance(value, dict):
        value[SEAL] = json_digest(value)
    write(tmp_path, "config.json", json.dumps(value).encode())
    found = reads(lambda: resolve(read_config_file(tmp_path)[0]))
    assert isinstance(found, str | Config)


@examples(25)
@given(content=damaged(json.dumps(CONFIG).encode()))
def test_a_damaged_config_of_a_run(content: bytes, tmp_path: pathlib.Path) -> None:
    write(tmp_path, "config.json", content)
    reads(lambda: resolve(read_config_file(tmp_path)[0]))


FIELDS = sorted(f"config.{group}.{name}" for group, fields in CONFIG.items() for name in fields)
TEXTS = (
    SCALARS.map(str)
    | VALUES.map(str)
    | st.sampled_from(["1e9999999999", "((((", "'", "9" * 5000, "1_0", "٣"])
)


@examples(60)
@given(path=st.sampled_from([*FIELDS, "config.x", "config.", "config.model.memory.length", ""]), text=TEXTS)
def test_overrides_of_anything(path: str, text: str) -> None:
    def override() -> Config:
        values = default_config().to_dict()
        apply_overrides(values, [Override(path, text)])
        return resolve(values)

    reads(override)


RESULT = json.loads(
    (pathlib.Path(__file__).parents[1] / "format1/data/text_step4_evaluation.json").read_text()
)


@examples(15)
@given(data=st.data())
def test_results_of_anything(data: st.DataObject, tmp_path: pathlib.Path) -> None:
    value = data.draw(changed_json(RESULT))
    content = (
        dump_json(value).encode()
        if data.draw(st.booleans())
        else data.draw(damaged(json.dumps(RESULT).encode()))
    )
    path = write(tmp_path, "x.json", content)
    reads(lambda: read_evaluation(path))
