"""Requests of lm-evaluation-harness, answered together and by a model that reads each of them alone."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import Config, DataConfig, UserError
from fam_jax.evaluation import harness
from fam_jax.evaluation.answering import Answering
from fam_jax.evaluation.harness import Generation, Requests, read_generation
from fam_jax.evaluation.journal import Journal
from fam_jax.evaluation.text import Scores
from fam_jax.generation.sampling import GREEDY, Sampling
from fam_jax.generation.text import TextModel
from fam_jax.model import empty_state
from launch import evaluate
from tests.evaluation.fake import Bytes
from tests.generation.tiny import CONFIG
from tests.model.tiny import build, params_of

MODEL = dataclasses.replace(CONFIG, vocab_size=258)
LONGEST = 128
WORDS = ("", " ", "a", "ab c", "the sea ", "\n", "é", "the sea and the land and more")


class Spelled(Bytes):
    """Bytes that know how their start token is spelled."""

    named_tokens = {"bos_token": "<s>"}  # noqa: RUF012


def model_of(*, add_bos: bool, vocabulary: Any = None) -> TextModel:
    config = Config(model=MODEL, data=DataConfig(add_bos=add_bos))
    return TextModel(config, params_of(MODEL), vocabulary or Bytes())


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def model(request: pytest.FixtureRequest) -> TextModel:
    return model_of(add_bos=request.param)


def answering(model: TextModel, **how: Any) -> Requests:
    return Requests(model, **{"batch_size": 2, "chunk_blocks": 1, **how})


@jax.jit
def _forward(params: Any, tokens: jax.Array) -> jax.Array:
    logits = build(MODEL, params)(tokens, empty_state(MODEL, 1), aligned=True)[0]
    return jax.nn.log_softmax(logits)[0]


def alone(model: TextModel, context: str, continuation: str) -> tuple[float, bool]:
    """Return the log probability of a continuation, and whether it is the likeliest, from one call of the model."""
    before = [1] * model.config.data.add_bos + Bytes().encode(context.rstrip())
    before = before or [0]  # the end token where there is nothing else
    after = Bytes().encode(context[len(context.rstrip()) :] + continuation)
    ids = np.array([*before, *after])
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(ids)] = ids
    logprobs = np.asarray(_forward(model.streamer.params, padded))
    places = np.arange(len(before) - 1, len(ids) - 1)
    return float(logprobs[places, after].sum()), bool((logprobs[places].argmax(-1) == after).all())


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), min_size=1, max_size=6))
@settings(max_examples=20)
def test_any_pairs_are_as_likely_as_alone(model: TextModel, pairs: list[tuple[str, str]]) -> None:
    check_pairs(model, pairs)


def test_pairs_are_as_likely_as_alone(model: TextModel) -> None:
    """Repeated, with a shared context, without a context, with blanks at its end, of blanks alone, of nothing."""
    pairs = [("the sea", " is"), ("", "the"), ("the sea", " was"), ("the sea", " is"), ("the sea ", "is")]
    check_pairs(model, [*pairs, (" ", "ab"), ("the sea", "\n\n\n"), ("the sea", ""), ("the sea", " \u00e9")])


def check_pairs(model: TextModel, pairs: list[tuple[str, str]]) -> None:
    """Whatever shares a batch or a context with them, and however often they are asked."""
    told: list[Any] = []
    found = answering(model).loglikelihoods(pairs, lambda pair, _: told.append(pair))
    assert found.keys() == {*pairs}
    assert sorted(told) == sorted({pair for pair in pairs if pair[1]})
    for context, continuation in pairs:
        value = found[context, continuation].value
        expected = alone(model, context, continuation) if continuation else (0.0, True)
        assert value.sum == pytest.approx(expected[0], abs=2e-4) and value.greedy == expected[1]


def test_what_is_likeliest_is_greedy() -> None:
    """A model that repeats what it has just read, as its layers add nothing to the embedding."""
    params = jax.tree.map(np.array, params_of(MODEL))
    for name in ("output", "down"):
        params["layers"][name]["kernel"][:] = 0
    table = params["embedding"]["table"]
    params["embedding"]["table"] = table / np.linalg.norm(table, axis=1, keepdims=True)
    params["final_norm"]["scale"][:] = 1
    parrot = TextModel(Config(model=MODEL), params, Bytes())
    found = answering(parrot).loglikelihoods([("a", "aaa"), ("a", "aab"), ("b", "aaa")])
    assert [answer.value.greedy for answer in found.values()] == [True, False, False]


def test_a_context_is_read_once(model: TextModel) -> None:
    pairs = [("the sea and the land", f" {word}") for word in ("is", "was", "is", "will be")] * 2
    requests = answering(model)
    found = requests.loglikelihoods(pairs)
    items = {answer.item.item.id: answer.item for answer in found.values() if answer.item is not None}
    assert len(items) == 1
    tokens = 20 + model.config.data.add_bos
    assert requests.cost.needed == tokens == next(iter(items.values())).tokens_read == requests.longest


@pytest.mark.parametrize("batch_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_whole_texts_have_no_windows(model: TextModel, batch_size: int) -> None:
    """Texts of many blocks are as likely as from one call that sees all of them."""
    texts = ["", "a", "the sea and the land " * 5, "é" * 20, "a", " blanks \n"]
    requests = answering(model, batch_size=batch_size, chunk_blocks=2)
    found = requests.rolling(texts)
    assert found.keys() == {*texts} and found[""].value.sum == 0
    for text in filter(None, texts):
        # Blanks at the ends count too: nothing is stripped.
        assert found[text].value.sum == pytest.approx(alone(model, "", text)[0], rel=1e-4)
        assert found[text].value.tokens == len(text.encode())
    assert requests.cost.needed == sum(len(text.encode()) for text in {*texts})


@pytest.mark.slow
def test_texts_are_generated_as_alone(model: TextModel) -> None:
    """Each up to its own stop strings and largest number of tokens; blanks at the end of a prompt stay."""
    likeliest = answering(model).generated([("the sea", Generation(20, ()), 0)])
    said = next(iter(likeliest.values())).value
    stops = ((), (said[3:5],)) if len(said) > 5 else ((),)
    requests = [
        (context, Generation(count, stop), 0)
        for context in ("the sea", "the sea ", "a\n\n")
        for count, stop in [(5, ()), *((20, stop) for stop in stops)]
    ]
    found = answering(model, batch_size=4).generated([*requests, *requests])
    for request in requests:
        context, generation, _ = request
        state = model.read(context)
        expected = model.generate(state, max_tokens=generation.max_tokens, stop=generation.stop)
        assert (found[request].value, found[request].item.tokens_generated) == (
            expected.text,
            expected.tokens,
        )


@pytest.mark.slow
def test_samples_depend_on_seed_and_request_alone() -> None:
    model = model_of(add_bos=True)
    hot = Generation(8, (), Sampling(temperature=2.0))
    requests = [("the sea", hot, number) for number in range(3)] + [("the land", hot, 0)]
    found = {request: answer.value for request, answer in answering(model).generated(requests).items()}
    assert len({*found.values()}) > 2
    one = answering(model, batch_size=4).generated(requests[1:2])
    assert one[requests[1]].value == found[requests[1]]
    other = answering(model, seed=1).generated(requests)
    assert {answer.value for answer in other.values()} != {*found.values()}


def test_answers_are_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed evaluation asks only for what has no answer."""
    model = model_of(add_bos=False)
    pairs, texts = [("a", " b"), ("a", " c"), ("d", " e"), ("f", " g")], ["one", "two"]

    def run(journal: Journal) -> list[Any]:
        requests = answering(model)
        requests.write_to(journal, "lm_eval:x")
        parts = (requests.loglikelihoods(pairs), requests.rolling(texts))
        return [{request: answer.value for request, answer in part.items()} for part in parts]

    expected = run(Journal(tmp_path / "whole.jsonl", {}))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3 + 2
    asked: list[str] = []
    run_items, scores = Answering.run, harness.document_scores

    def count(streamer: Any, documents: Any, setting: Any) -> list[Scores]:
        asked.extend("text" for _ in documents.examples)
        return scores(streamer, documents, setting)

    monkeypatch.setattr(
        Answering, "run", lambda self, items: asked.extend(i.id for i in items) or run_items(self, items)
    )
    monkeypatch.setattr(harness, "document_scores", count)
    for whole in (1, 3, 4, 6):
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:whole]))
        asked.clear()
        assert run(Journal(tmp_path / "part.jsonl", {})) == expected
        assert len(asked) == 6 - whole
        assert sorted((tmp_path / "part.jsonl").read_bytes().splitlines(True)) == sorted(lines)


def test_a_start_token_that_a_prompt_spells_is_read_once() -> None:
    model = model_of(add_bos=True, vocabulary=Spelled())
    found = answering(model).loglikelihoods([("<s>the sea", " is"), ("the sea", " is")])
    assert found["<s>the sea", " is"].value == found["the sea", " is"].value
    assert {answer.item.tokens_read for answer in found.values()} == {8}
    plain = answering(model_of(add_bos=False, vocabulary=Spelled())).loglikelihoods([("<s>the sea", " is")])
    assert next(iter(plain.values())).item.tokens_read == 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Generation(256, ())),
        ({"until": "\n"}, Generation(256, ("\n",))),
        ({"until": ["\n", "", "Q:", "\n"], "max_gen_toks": 9}, Generation(9, ("\n", "Q:"))),
        ({"until": None, "max_new_tokens": "7", "max_tokens": 8, "top_p": None}, Generation(7, ())),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Generation(256, ())),
        ({"temperature": 0.0, "do_sample": True}, Generation(256, ())),
        ({"do_sample": True}, Generation(256, (), Sampling(1.0))),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, Generation(256, (), Sampling(0.5, 4, 0.9))),
    ],
)
def test_how_requests_want_their_text(given: dict[str, Any], expected: Generation) -> None:
    assert read_generation(given) == expected and (expected.sampling == GREEDY) == (
        expected.sampling.temperature == 0
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams: is not supported; leave it out"),
        ({"max_gen_toks": 0}, "generation_kwargs.max_gen_toks: must be at least 1, got 0"),
        ({"do_sample": True, "top_p": 3}, "top_p: must be above 0 and at most 1"),
    ],
)
def test_requests_that_cannot_be_answered(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_generation(given)


def test_without_the_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is a line, says what to install, and comes before a model is loaded."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fam_jax.evaluation.lm_eval", raising=False)
    for flag in ("--tasks", "--suite", "--task"):
        with pytest.raises(
            UserError, match=r"^lm_eval: .* is not installed.*; install fam-jax\[lm-eval\], or"
        ) as found:
            evaluate.main([f"--checkpoint={tmp_path}", f"{flag}=lm_eval:hellaswag"])
        assert "\n" not in str(found.value)
