import os
import re
from pathlib import Path

import pytest
import sentencepiece

from fam_jax.config import UserError
from fam_jax.data import passkey_vocabulary, quiet_seqio
from fam_jax.data.passkey_text import example_text
from fam_jax.data.vocabulary import SHIPPED, load_vocabulary


@pytest.mark.parametrize("key", ["7", "90210", "123456789", "1000000000"])
def test_round_trip_of_task_text(vocabulary_name: str, key: str) -> None:
    vocabulary = load_vocabulary(vocabulary_name)
    text = " ".join(example_text(key, 2))
    ids = vocabulary.encode(text)
    assert vocabulary.unk_id not in ids
    assert vocabulary.decode(ids) == text


def test_shipped_vocabulary_has_one_piece_per_word_and_digit() -> None:
    vocabulary = load_vocabulary("passkey")
    assert vocabulary.vocab_size == 51
    assert vocabulary.pad_id == 0
    prompt, answer = example_text("8051327", 3)
    assert len(vocabulary.encode(prompt)) == len(re.findall(r"[a-zA-Z]+|[.,?]|\d|(?= \d)", prompt))
    assert len(vocabulary.encode(answer)) == 1 + len(answer)
    assert len(set(vocabulary.encode("0123456789"))) == 1 + 10


def test_the_trainer_reproduces_the_shipped_vocabulary(tmp_path: Path) -> None:
    paths = [tmp_path / "a.model", tmp_path / "b.model"]
    for path in paths:
        assert passkey_vocabulary.main(["--out", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()

    def pieces(path: Path) -> list[str]:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return [model.id_to_piece(i) for i in range(model.get_piece_size())]

    assert pieces(paths[0]) == pieces(SHIPPED["passkey"])
    assert str(tmp_path).encode() not in paths[0].read_bytes()


def test_trainer_reports_an_unwritable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        passkey_vocabulary.main(["--out", str(tmp_path / "none" / "x.model")])


def test_bad_files_are_reported_at_load_time(tmp_path: Path) -> None:
    whole = SHIPPED["passkey"].read_bytes()
    bad = {"empty": b"", "text": b"hello there\n" * 20, "cut": whole[: len(whole) // 2]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in (*bad, "folder", "missing", ""):
        with pytest.raises(UserError) as caught:
            load_vocabulary(str(tmp_path / name) if name else "")
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_the_error_for_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(UserError, match=r"no such file.*bytes or passkey"):
        load_vocabulary("byte")


def test_output_of_an_import_is_shown_only_if_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_seqio._stderr_held_back():
        os.write(2, b"noise")
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError), quiet_seqio._stderr_held_back():  # noqa: PT012
        os.write(2, b"the reason")
        raise ImportError
    os.write(2, b", and after")
    assert capfd.readouterr().err == "the reason, and after"


@pytest.mark.skipif(not quiet_seqio.tf.config.list_physical_devices("GPU"), reason="needs a GPU")
def test_tensorflow_uses_no_gpu() -> None:
    assert quiet_seqio.tf.config.get_visible_devices("GPU") == []
