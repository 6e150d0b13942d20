"""The adapter and the harness' own model of transformers, on a model that both can read: the same answers."""

import json
import pathlib
from typing import Any, NamedTuple

import pytest

from launch import import_hf
from tests.hf.tokenizer_folders import byte_level

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("accelerate")  # the harness needs it for models of transformers
pytestmark = pytest.mark.slow

BEGIN, END = "<|begin|>", "<|end|>"
CONTEXTS = (
    "the capital of France is",
    "the capital of France is ",
    "a book about rivers\n\n",
    "",
    "Q: é 😀?\nA:",
)
CONTINUATIONS = (" Paris", "Paris", " sea by night", "\n", " é 😀")
LONG = " book by night" * 30


class Asked(NamedTuple):
    args: tuple[Any, ...]


def write_model(folder: pathlib.Path, kind: str, *, bos: bool) -> None:
    """Write a random model with its tokenizer, as transformers does."""
    from tests.hf import hf_models

    named = {"eos_token": END} | ({"bos_token": BEGIN} if bos else {})
    tokenizer = byte_level(f"{BEGIN} $A" if bos else "", (BEGIN, END))
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "max_position_embeddings": 2048,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setitem(hf_models.SIZES, name, value)
        model = hf_models.make(kind)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.token_to_id(BEGIN) if bos else None
        config.eos_token_id, config.pad_token_id = tokenizer.token_to_id(END), None
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("qwen3", False)])
def test_answers_are_those_of_transformers(tmp_path: pathlib.Path, kind: str, bos: bool) -> None:
    """Pairs, whole texts and generated texts; without a context, behind the start token or the end token."""
    from lm_eval.models.huggingface import HFLM

    from fam_jax.evaluation.lm_eval import HarnessLM

    write_model(tmp_path / "model", kind, bos=bos)
    arguments = [f"--source={tmp_path / 'model'}", f"--out={tmp_path / 'run'}", "--dtype=float32"]
    memory = ["--config.model.memory.kind=full", "--config.model.memory.context=2048"]
    import_hf.main([*arguments, "--block_size=64", *memory])
    ours = HarnessLM.restore(tmp_path / "run", batch_size=4)
    how = {"dtype": "float32", "device": "cpu", "batch_size": 4, "max_length": 2048}
    theirs = HFLM(pretrained=str(tmp_path / "model"), add_bos_token=bos, **how)
    pairs = [Asked((context, more)) for context in (*CONTEXTS, LONG) for more in CONTINUATIONS]
    pairs += pairs[:2]
    found, wanted = ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in wanted], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in wanted]
    limits = [
        {"until": ["\n"], "max_gen_toks": 8},
        {"until": [" "], "max_gen_toks": 12},
        {"until": [END], "max_gen_toks": 5},
    ]
    texts = [Asked((context, limit)) for context in (*CONTEXTS, LONG) if context for limit in limits]
    assert ours.generate_until(texts) == theirs.generate_until(texts, disable_tqdm=True)
    # Its whole texts would begin with two start tokens.
    theirs.add_bos_token = False
    whole = [Asked((text,)) for text in (LONG, "a", "é\n")]
    wanted = theirs.loglikelihood_rolling(whole, disable_tqdm=True)
    assert ours.loglikelihood_rolling(whole) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
