"""Tokenizers of open checkpoints: found, checked against the model, and read as vocabularies."""

import json

import pytest
import tokenizers

from fam_jax.config import UserError
from fam_jax.data.quiet_seqio import tf
from fam_jax.data.vocabulary import SHIPPED, load_vocabulary
from fam_jax.hf import ConvertError, check_tokenizer, find_tokenizer

TEXT = "Grün ist das Gras."


@pytest.fixture
def folder(tmp_path):
    """Make a byte-level tokenizer that ends texts with </s>, as transformers saves it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None})
    )
    return tmp_path


def size_of(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def test_a_tokenizer_file_is_a_vocabulary(folder):
    vocabulary = load_vocabulary(str(folder / "tokenizer.json"))
    ids = vocabulary.encode(TEXT)
    assert 0 < len(ids) < len(TEXT.encode())
    assert vocabulary.decode(ids) == TEXT
    assert vocabulary.vocab_size == size_of(folder)
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (0, None, None)
    assert vocabulary.decode([*ids, 0, *ids]) == TEXT  # up to the end of the text


def test_it_works_in_tensorflow_too(folder):
    vocabulary = load_vocabulary(str(folder / "tokenizer.json"))
    data = tf.data.Dataset.from_tensors(TEXT).map(vocabulary.encode_tf)
    (ids,) = list(data.as_numpy_iterator())
    assert ids.tolist() == vocabulary.encode(TEXT)
    assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [TEXT.encode()] * 2


def test_without_a_config_beside_it_no_piece_is_special(folder):
    (folder / "tokenizer_config.json").unlink()
    assert load_vocabulary(str(folder / "tokenizer.json")).eos_id is None


def test_a_missing_or_damaged_vocabulary_is_reported_in_one_line(folder):
    (folder / "damaged.json").write_text("{}")
    for name, says in (("damaged.json", "damaged one"), ("missing.json", "no such file")):
        with pytest.raises(UserError, match=says):
            load_vocabulary(str(folder / name))


def test_a_tokenizer_json_comes_first(folder):
    (folder / "tokenizer.model").write_bytes(SHIPPED["passkey"].read_bytes())
    assert find_tokenizer(folder).name == "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    assert find_tokenizer(folder).name == "tokenizer.model"
    (folder / "tokenizer.model").unlink()
    assert find_tokenizer(folder) is None


def test_added_tokens_may_lie_beyond_the_table_but_not_those_around_a_text(folder):
    path, size = folder / "tokenizer.json", size_of(folder)
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens(["<image>", "<start>"])
    made.save(str(path))
    check_tokenizer(path, size)
    for settings in ({"eos_token": "<image>"}, {"bos_token": "<start>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        check_tokenizer(path, size + 2)
        with pytest.raises(
            ConvertError, match=f"has {size + 2} pieces, but the model's vocab_size is {size}"
        ):
            check_tokenizer(path, size)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    path = folder / ("tokenizer.model" if name == "tokenizer.model" else "tokenizer.json")
    with pytest.raises(ConvertError, match=rf"{name}: is a pointer of Git LFS.*run `git lfs pull`"):
        check_tokenizer(path, 300)


def test_a_tokenizer_fits_a_table_of_its_size_or_a_padded_one(folder):
    size = size_of(folder)
    for vocab_size in (size, size + 512):
        check_tokenizer(folder / "tokenizer.json", vocab_size)
    for vocab_size in (size - 2, size + 2000):
        with pytest.raises(
            ConvertError, match=f"has {size} pieces, but the model's vocab_size is {vocab_size}"
        ):
            check_tokenizer(folder / "tokenizer.json", vocab_size)
    with pytest.raises(ConvertError, match="pieces, but the model's vocab_size is 10"):
        check_tokenizer(SHIPPED["passkey"], 10)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_rejected(folder, name):
    (folder / name).write_bytes(b"nothing")
    with pytest.raises(ConvertError, match="is damaged or not a tokenizer"):
        check_tokenizer(folder / name, 300)
    (folder / name).unlink()
    with pytest.raises(ConvertError, match="no such file"):
        check_tokenizer(folder / name, 300)


def test_a_tokenizer_without_its_unknown_token_is_rejected(folder):
    """It would fail at the first text with a character that no piece has."""
    damaged = json.loads((folder / "tokenizer.json").read_text())
    damaged["model"] |= {"unk_token": "<gone>", "vocab": {"</s>": 0, "a": 1}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(damaged | {"pre_tokenizer": None}))
    with pytest.raises(ConvertError, match="is damaged or not a tokenizer"):
        check_tokenizer(folder / "tokenizer.json", 300)
    with pytest.raises(UserError, match="is a damaged one; name another file"):
        load_vocabulary(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{bad", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ('{"eos_token": 5}', "eos_token: expected a string, or an object with its content, got 5"),
        ('{"bos_token": {"content": [1]}}', "bos_token: expected a string"),
    ],
)
def test_a_damaged_config_beside_it_is_rejected(folder, content, says):
    size = size_of(folder)
    check_tokenizer(folder / "tokenizer.json", size)
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConvertError, match=r"tokenizer_config\.json: ") as caught:
        check_tokenizer(folder / "tokenizer.json", size)
    assert says in str(caught.value)
