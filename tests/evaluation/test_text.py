"""Streamed losses equal those of passes over whole sequences; ablations change what they should and nothing else."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax import sharding
from fam_jax.config import DataConfig, EvaluateConfig, MeshConfig, ModelConfig, UserError
from fam_jax.data.interface import Example
from fam_jax.evaluation.task import Measured, OnProgress, Setting
from fam_jax.evaluation.text import Documents, document_tables, measure_documents
from fam_jax.generation.streaming import Streamer
from tests.evaluation.fake import FakeStreamer
from tests.generation.tiny import CONFIG, forward, texts
from tests.model.tiny import params_of, variant

LENGTHS = (1, 3, 4, 5, 17, 33, 40)
C = CONFIG.block_size


START = 1  # read before the first token of a document


def example(ids: np.ndarray, weights: np.ndarray | None = None, text_bytes: int = 0) -> Example:
    return Example(ids, np.ones(len(ids), np.float32) if weights is None else weights, text_bytes)


EXAMPLES = [example(ids, text_bytes=2 * len(ids)) for ids in texts(*LENGTHS)]


def measure(
    examples: list[Example] = EXAMPLES,
    params: Any = None,
    *,
    model: ModelConfig = CONFIG,
    start_id: int = START,
    on_progress: OnProgress | None = None,
    **evaluate: Any,
) -> Measured:
    settings = EvaluateConfig(**{"batch_size": 3, "chunk_blocks": 4, **evaluate})
    streamer = Streamer(model, params_of(model) if params is None else params)
    setting = Setting(model, DataConfig(), settings, tokens_at_once=10)
    return measure_documents(streamer, Documents(examples, None, start_id), setting, on_progress)


def run(*args: Any, **how: Any) -> dict[str, Any]:
    return measure(*args, **how).details


def direct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, from one pass over the document, the nats of every token and whether it is the likeliest."""
    logits = forward(np.append(START, ids[:-1]).astype(np.int32)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -logprobs[np.arange(len(ids)), ids], logits.argmax(axis=1) == ids


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run()


def test_documents_of_uneven_lengths_cost_little_padding() -> None:
    """Lengths as those of books, in 16 rows: at most 1.1 tokens are paid for each that is needed."""
    random = np.random.default_rng(0)
    lengths = [*map(int, np.exp(random.normal(7, 0.8, 50)))]
    streamer = FakeStreamer(lambda *_: 0.0, block_size=16)
    documents = Documents([example(np.full(n, 2, np.int32)) for n in lengths], None, START)
    setting = Setting(CONFIG, DataConfig(), EvaluateConfig(batch_size=16, chunk_blocks=8))
    found = measure_documents(streamer, documents, setting).details  # type: ignore[arg-type]
    assert found["tokens_read"] == sum(lengths) and found["next_token_accuracy"] == 1
    assert sum(streamer.calls) <= 1.1 * sum(lengths)


def test_totals_are_those_of_whole_passes(plain: dict[str, Any]) -> None:
    nats, correct = (np.concatenate(parts) for parts in zip(*(direct(e.ids) for e in EXAMPLES), strict=True))
    assert plain["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert plain["next_token_accuracy"] == correct.mean()
    assert plain["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert plain["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / (2 * len(nats)), rel=1e-5)
    assert plain["tokens"] == plain["tokens_read"] == sum(LENGTHS)
    assert (plain["documents"], plain["longest_document"]) == (len(LENGTHS), 40)
    late = np.concatenate([direct(e.ids)[0][C:] for e in EXAMPLES])
    assert plain["loss_after_first_block"] == pytest.approx(late.mean(), rel=1e-5)
    assert plain["ablations"] == {}


def test_losses_by_position_are_those_of_whole_passes(plain: dict[str, Any]) -> None:
    found = plain["by_position"]
    assert [(b["begin"], b["end"]) for b in found] == [(0, 16), (16, 32), (32, 64)]
    assert [b["documents"] for b in found] == [7, 3, 2]
    for bucket in found:
        nats = np.concatenate([direct(e.ids)[0][bucket["begin"] : bucket["end"]] for e in EXAMPLES])
        assert bucket["tokens"] == len(nats)
        assert bucket["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    for example, by_document in zip(EXAMPLES, plain["by_document"], strict=True):
        nats = np.split(direct(example.ids)[0], [b["end"] for b in found if b["end"] < len(example.ids)])
        assert by_document["tokens"] == [*map(len, nats)]
        assert by_document["nats"] == pytest.approx([part.sum() for part in nats], rel=1e-5)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 64}, {"chunk_blocks": 1}])
def test_batches_and_chunks_change_nothing(plain: dict[str, Any], settings: dict[str, int]) -> None:
    found = run(**settings)
    assert (
        found["tokens_read"] == plain["tokens_read"]
        and found["next_token_accuracy"] == plain["next_token_accuracy"]
    )
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_tokens_without_weight_are_read_but_do_not_count() -> None:
    [ids] = texts(30)
    weights = (np.arange(30) % 3 == 0).astype(np.float32)
    found = run([example(ids, weights)])
    assert found["loss"] == pytest.approx(direct(ids)[0][::3].mean(), rel=1e-5)
    assert found["tokens_read"] == 30 and found["bits_per_byte"] is None
    assert [bucket["tokens"] for bucket in found["by_position"]] == [6, 4]
    with pytest.raises(UserError, match="no token has a loss weight"):
        run([example(ids, 0 * weights)])


@pytest.fixture(scope="module")
def ablated() -> dict[str, Any]:
    return run(ablations=("zeroed", "shuffled", "frozen"))


def test_ablations_leave_the_loss_itself_alone(plain: dict[str, Any], ablated: dict[str, Any]) -> None:
    assert {**ablated, "ablations": {}, "seconds": 0} == {**plain, "seconds": 0}
    assert list(ablated["ablations"]) == ["zeroed", "shuffled", "frozen"]


@pytest.mark.parametrize("name", ["zeroed", "shuffled", "frozen"])
def test_an_ablation_changes_what_follows_the_first_block_only(name: str) -> None:
    short = [example(ids) for ids in texts(*[C] * 5)]
    found = run(short, ablations=(name,))
    assert found["ablations"][name]["loss"] == found["loss"]
    assert found["loss_after_first_block"] is None is found["ablations"][name]["loss_after_first_block"]
    longer = [example(ids) for ids in texts(*[C + 1] * 5)]
    found = run(longer, ablations=(name,))
    assert abs(found["ablations"][name]["loss_after_first_block"] - found["loss_after_first_block"]) > 1e-5


def test_a_frozen_memory_without_segments_makes_every_block_a_document_of_its_own() -> None:
    """Such a document starts with the token before the block; a real one starts with the end of another document."""
    model = variant(CONFIG, segments=0)
    [ids] = texts(5 * C)
    found = run([example(ids)], model=model, ablations=("frozen",))
    total = 0.0
    for begin in range(0, len(ids), C):
        before = int(ids[begin - 1]) if begin else START
        total += C * run([example(ids[begin : begin + C])], model=model, start_id=before)["loss"]
    assert found["ablations"]["frozen"]["loss"] == pytest.approx(total / len(ids), rel=1e-5)
    assert abs(found["loss"] - total / len(ids)) > 1e-4


def test_shuffling_the_states_of_equal_documents_changes_nothing() -> None:
    [ids] = texts(33)
    found = run([example(ids)] * 3, ablations=("shuffled", "zeroed"))
    assert found["ablations"]["shuffled"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert abs(found["ablations"]["zeroed"]["loss"] - found["loss"]) > 1e-5


def test_differences_are_those_of_the_losses() -> None:
    found = run(ablations=("zeroed", "frozen"))
    for part in found["ablations"].values():
        whole = part["difference_after_first_block"]
        assert whole["mean"] == pytest.approx(
            part["loss_after_first_block"] - found["loss_after_first_block"], abs=1e-6
        )
        assert whole["low"] < whole["mean"] < whole["high"]
        for before, after in zip(found["by_position"], part["by_position"], strict=True):
            assert after["difference"]["mean"] == pytest.approx(after["loss"] - before["loss"], abs=1e-6)
    # A document of one block: nothing to compare after it.
    short = run([example(np.array([3, 4], np.int32))], ablations=("zeroed",))["ablations"]["zeroed"]
    assert short["difference_after_first_block"] is None
    assert short["by_position"][0]["difference"]["low"] is None


def test_a_memory_that_nobody_reads_can_be_ablated() -> None:
    """With an output projection of zero, attention has no effect, whatever FAM holds."""
    params = jax.tree.map(np.array, params_of(CONFIG))
    params["layers"]["output"]["kernel"][:] = 0
    found = run(params=params, ablations=("zeroed", "shuffled", "frozen"))
    for name in found["ablations"]:
        assert found["ablations"][name]["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_all_past_blocks_that_a_memory_keeps_are_ablated_together() -> None:
    model = variant(CONFIG, previous_blocks=3, segments=0)
    rows = [example(ids) for ids in texts(40, 40)]
    # All but the last two blocks differ, which must not matter once the FAMs are ablated.
    changed = [
        example(np.append(7 - each.ids[: -2 * C] % 7, each.ids[-2 * C :]).astype(np.int32)) for each in rows
    ]
    last = np.append(np.zeros(40 - C), np.ones(C)).astype(np.float32)
    results = [
        run([each._replace(weights=last) for each in which], model=model, ablations=("zeroed", "frozen"))
        for which in (rows, changed)
    ]
    assert abs(results[0]["loss"] - results[1]["loss"]) > 1e-6
    for name in ("zeroed", "frozen"):
        assert results[0]["ablations"][name]["loss"] == results[1]["ablations"][name]["loss"]


def test_on_a_mesh(plain: dict[str, Any]) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    params = jax.device_put(params_of(CONFIG), sharding.param_shardings(params_of(CONFIG), mesh))
    found = run(params=params, batch_size=4, ablations=("shuffled",))
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["tokens_read"] == plain["tokens_read"]


def test_progress_ends_with_all_tokens() -> None:
    told: list[tuple[str, int, int]] = []
    run(ablations=("zeroed",), on_progress=lambda *x: told.append(x))
    for name in ("loss", "zeroed"):
        own = [done for which, done, _ in told if which == name]
        assert own == sorted(own) and own[-1] == sum(LENGTHS)
    assert {total for *_, total in told} == {sum(LENGTHS)}


def test_truncation_does_not_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Streamer.measure

    def truncated(self: Streamer, inputs: Any, targets: Any, state: Any, **how: Any) -> Any:
        *scores, state = whole(self, inputs[:, :C], targets[:, :C], state, **how)
        rest = ((0, 0), (0, inputs.shape[1] - C))
        return *(np.pad(part, rest) for part in scores), state

    monkeypatch.setattr(Streamer, "measure", truncated)
    with pytest.raises(RuntimeError, match="results would be misleading"):
        run()


def test_mistakes() -> None:
    with pytest.raises(UserError, match="shuffled needs two documents in a batch"):
        run(EXAMPLES[:1], ablations=("shuffled",))
    with pytest.raises(UserError, match="shuffled needs two documents in a batch"):
        run(batch_size=1, ablations=("shuffled",))


def test_equal_logits_are_never_right() -> None:
    """Not even token 0 counts as right, the first among equals."""
    params = jax.tree.map(np.zeros_like, params_of(CONFIG))
    found = run([example(np.zeros(9, np.int32)), EXAMPLES[-1]], params)
    assert found["next_token_accuracy"] == 0
    assert found["loss"] == pytest.approx(math.log(CONFIG.vocab_size), rel=1e-6)


def test_every_figure_has_a_name_that_does_not_change() -> None:
    found = measure(ablations=("zeroed",))
    whole, zeroed = found.details, found.details["ablations"]["zeroed"]
    names = ("loss", "perplexity", "bits_per_byte", "next_token_accuracy", "loss_after_first_block")
    expected = {name: whole[name] for name in names}
    for prefix, part in (("", whole), ("zeroed/", zeroed)):
        expected |= {f"{prefix}{name}": part[name] for name in ("loss", "loss_after_first_block")}
        for end, bucket in zip((16, 32, 64), part["by_position"], strict=True):
            expected[f"{prefix}loss_by_position/{end}"] = bucket["loss"]
    expected["zeroed/difference_after_first_block"] = zeroed["difference_after_first_block"]["mean"]
    assert found.scalars == expected and all(isinstance(value, float) for value in expected.values())

    # One token: nothing after the first block, and no text to count bytes of.
    names = measure([example(np.array([3], np.int32))]).scalars.keys()
    assert names == {"loss", "perplexity", "next_token_accuracy", "loss_by_position/16"}


def test_tables() -> None:
    total, places = document_tables(run(ablations=("zeroed", "frozen")), "a title")
    labels = [*total.columns[0].cells]
    assert total.title == "a title" and "next-token accuracy" in labels
    assert "loss after the first block, memory zeroed" in labels
    assert [column.header for column in places.columns][-3:] == ["loss", "memory zeroed", "memory frozen"]
    assert places.row_count == 3
