"""Vocabularies to test the data code with, besides the two built-in ones."""

import io
import pathlib
import random

import pytest
import sentencepiece

from fam_jax.data.passkey_text import example_text
from tests.data.chat_templates import PLAIN_CHAT as TEMPLATE

VOCABULARIES = ("passkey", "bytes", "merged_digits", "unnormalised")


def _train(**options: object) -> bytes:
    numbers = random.Random(0)
    text = [" ".join(example_text(str(numbers.randrange(10, 99999)), 1)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def vocabulary_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the name or path for `load_vocabulary`, by the names in VOCABULARIES."""
    folder = tmp_path_factory.mktemp("vocabularies")
    # Several digits in one piece: answers of different lengths.
    (folder / "merged_digits.model").write_bytes(
        _train(vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, split_digits=False)
    )
    # Like that of open checkpoints: no padding id, spaces kept, bytes for unknown characters.
    (folder / "unnormalised.model").write_bytes(
        _train(
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    )
    trained = {name: str(folder / f"{name}.model") for name in ("merged_digits", "unnormalised")}
    return {"passkey": "passkey", "bytes": "bytes", **trained}


@pytest.fixture(params=VOCABULARIES)
def vocabulary_name(request: pytest.FixtureRequest, vocabulary_names: dict[str, str]) -> str:
    return vocabulary_names[request.param]


@pytest.fixture
def template(tmp_path: pathlib.Path) -> str:
    """Return the file of a chat template for any vocabulary."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return str(tmp_path / "chat.jinja")
