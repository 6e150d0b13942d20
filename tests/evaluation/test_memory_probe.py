"""The probe of the memory: compared with models that read only what a way leaves them, and with plain gradients."""

import dataclasses
import io
import json
import math
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.running_mean import RunningMean, RunningMeanConfig
from fam_jax import sharding
from fam_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    UserError,
    group,
    setting,
)
from fam_jax.data.interface import Example
from fam_jax.evaluation import read_evaluation
from fam_jax.evaluation.documents import DocumentReader, Documents, Excerpt
from fam_jax.evaluation.memory_inspection import MemoryVectors, gradient_reach
from fam_jax.evaluation.memory_probe import memory_tables, plot_memory, probe_memory
from fam_jax.evaluation.memory_scores import excerpts_of, memory_scores
from fam_jax.evaluation.record import make_evaluation
from fam_jax.evaluation.task import Measured, Setting
from fam_jax.generation.streaming import Streamer
from fam_jax.memories import registry
from fam_jax.memories.window import BlockSlidingWindowConfig
from launch import evaluate
from tests.evaluation.runs import save_run
from tests.generation.tiny import CONFIG, texts
from tests.memories.cases import random_parameters
from tests.model.tiny import Reader, build, params_of, variant
from tests.variants import rest_slow

C = CONFIG.block_size
LENGTHS = (4 * C, 6 * C - 1, 9 * C + 1)
START = 1
BLOCKS = 4  # of the shortest document, and of one with every token
ANSWER = 3


def documents_of(*lengths: int, last: int = 0, **fields: Any) -> Documents:
    """Return random documents; with `last`, only so many tokens at the end of each count."""
    examples = [
        Example(ids, (np.arange(len(ids)) >= (len(ids) - last if last else 0)).astype(np.float32), 0)
        for ids in texts(*lengths)
    ]
    return Documents(examples, None, START, **fields)


def setting_of(model: ModelConfig, batch_size: int = 3) -> Setting:
    return Setting(model, DataConfig(), EvaluateConfig(batch_size=batch_size), tokens_at_once=64)


def reader_of(model: ModelConfig, params: Any, documents: Documents, batch_size: int = 3) -> DocumentReader:
    return DocumentReader(Streamer(model, params), documents, setting_of(model, batch_size))


def probe(
    model: ModelConfig, params: Any, documents: Documents, *, batch_size: int = 3, **how: Any
) -> dict[str, Any]:
    found = probe_memory(Streamer(model, params), documents, setting_of(model, batch_size), **how)
    return json.loads(json.dumps(found))


@group("model.memory", effect="state")
class UnreadConfig(RunningMeanConfig):
    """The group of :class:`Unread`."""

    kind: str = setting(default="unread", doc="The architecture.")

    @property
    def extra_keys(self) -> int:
        return 0


class Unread(RunningMean):
    """A running mean that no token reads."""

    Config: ClassVar[type[MemoryConfig]] = UnreadConfig

    def extra_of_piece(self, *_: Any) -> tuple[()]:
        return ()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Return a model whose memory is written and not read, and whose window is the own block."""
    monkeypatch.setattr(registry, "MEMORIES", dict(registry.MEMORIES))
    registry.register_memory("unread", Unread)
    return dataclasses.replace(CONFIG, memory=UnreadConfig(segments=0))


def test_a_change_that_changes_nothing_gives_the_same_bits() -> None:
    """Also where documents are of uneven lengths, and would keep fewer rows busy if these were refilled."""
    documents = documents_of(9 * CONFIG.block_size, 3, 5, CONFIG.block_size)
    reader = reader_of(CONFIG, params_of(CONFIG), documents)
    intact = reader.read_by_block("intact")
    same = reader.read_by_block("same", lambda state, start, blocks, batch: state)
    for one, other, each in zip(intact, same, reader.read("loss"), strict=True):
        np.testing.assert_array_equal(one.nats, other.nats)
        np.testing.assert_allclose(each.nats, one.nats, rtol=1e-5, atol=1e-6)


WAYS = ["zeroed", "shuffled", "frozen", "stopped", "window"]


def assert_no_difference(found: dict[str, Any]) -> None:
    """Check that all ways score exactly as the intact model does, and that no gradient leaves the last block."""
    assert found["skipped"] == {} and [*found["scores"]] == ["intact", *WAYS]
    assert [row["blocks"] for row in found["retention"]] == [1, 2, 4, 8]
    for row in [row for name, row in found["scores"].items() if name != "intact"] + found["retention"]:
        assert row["difference"]["mean"] == 0 == row["accuracy_difference"]["mean"]
        assert row["difference"]["low"] in (0, None) and row["loss"] == row["intact_loss"]
    assert found["gradients"]["by_blocks_back"][0] > 0
    assert not np.any(found["gradients"]["by_blocks_back"][1:])


def test_a_model_without_attention_gets_no_difference() -> None:
    """With an output projection of zero, attention has no effect, whatever the memory holds, which is zero here."""
    params = jax.tree.map(np.array, params_of(CONFIG))
    params["layers"]["output"]["kernel"][:] = 0
    found = probe(CONFIG, params, documents_of(*LENGTHS))
    assert_no_difference(found)
    assert found["alarms"] == ["layer 0: the memory is zero", "layer 1: the memory is zero"]


@pytest.mark.slow
def test_a_memory_that_nobody_reads_makes_no_difference(unread: ModelConfig) -> None:
    found = probe(unread, random_parameters(unread), documents_of(*LENGTHS))
    assert_no_difference(found)
    attention = found["inspected"]["attention"]
    assert not np.any(attention["memory"]) and not np.any(attention["past"])
    np.testing.assert_allclose(attention["own"], 1)
    assert found["alarms"] == []  # it is written, and differs


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return probe(CONFIG, params_of(CONFIG), documents_of(*LENGTHS))


def test_a_fresh_memory_is_used_and_has_not_collapsed(found: dict[str, Any]) -> None:
    assert found["alarms"] == [] and found["skipped"] == {}
    for name, row in found["scores"].items():
        if name != "intact":
            assert abs(row["difference"]["mean"]) > 1e-6
            assert row["difference"]["mean"] == pytest.approx(row["loss"] - row["intact_loss"], abs=1e-6)
    assert found["scores"]["zeroed"]["tokens"] == sum(LENGTHS) - 3 * C
    assert found["scores"]["stopped"]["tokens"] == sum(n - math.ceil(n / C) // 2 * C for n in LENGTHS)
    vectors, inspected = found["inspected"]["vectors"], found["inspected"]
    assert vectors["layers"] == [0, 1] and vectors["blocks"] == 4 and len(vectors["norm"]) == 9
    attention = inspected["attention"]
    total = sum(np.array(attention[name]) for name in ("memory", "past", "own"))
    np.testing.assert_allclose(total, 1)
    assert min(np.array(attention[name]).min() for name in ("memory", "past", "own")) > 0
    np.testing.assert_allclose(
        np.sum(attention["slots"], axis=1), np.mean(attention["memory"], axis=1), atol=0.2
    )
    assert len(attention["memory_by_block"]) == 10
    maps = np.array(inspected["maps"]["read"])  # one token, of the last block; the rest went to past blocks
    assert maps.shape == (2, 1, 2 + C) and (maps.sum(axis=2) < 1).all()
    slots = np.array(attention["slots"])
    assert slots.shape == (2, 2) and (slots > 0).all() and (slots.sum(axis=1) < 1).all()
    np.testing.assert_allclose(np.array(inspected["maps"]["write"]).sum(axis=2), 1, rtol=1e-5)
    picked = np.array(inspected["writing"]["tokens"])
    assert picked.min() >= 1 and picked.max() <= C
    # Gradients reach every block through the memory.
    norms = found["gradients"]["by_blocks_back"]
    assert found["gradients"]["documents"] == 3 and len(norms) == BLOCKS and min(norms) > 0


def test_the_record_the_page_and_the_tables(found: dict[str, Any], tmp_path: pathlib.Path) -> None:
    alarms = [f"layer {n}: the memory is zero" for n in range(6)]
    probes = {"memory": {**found, "alarms": alarms}}
    measured = Measured({"exact_match": 1.0}, {"groups": {}, "grouped_by": "blocks"}, probes)
    path = tmp_path / "x.json"
    written = make_evaluation(Config(), "passkey", 3, measured, command="", path=path)
    written.write()
    assert [place.name for place in written.files] == ["x.json", "x.memory.png"]
    assert (tmp_path / "x.memory.png").read_bytes().startswith(b"\x89PNG")
    assert read_evaluation(path) == written
    _, scores, distances, layers = written.tables()
    assert scores.title == "Memory of PassKey retrieval, step 3"
    assert [*scores.columns[0].cells] == [*found["scores"]]
    assert str(scores.caption).splitlines() == [f"ALARM {alarm}" for alarm in alarms]
    assert (distances.row_count, layers.row_count) == (4, 2)
    assert memory_tables(found, "")[0].caption is None


def nats_of(model: ModelConfig, params: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the nats of every target (T,), of a model that reads the inputs in one call and nothing before."""
    padded = np.zeros((1, 3 * C), np.int32)  # one shape to compile; later tokens do not change logits
    padded[0, : len(inputs)] = inputs
    [logits] = Reader(model, params, 1).read(padded, aligned=True)
    return np.asarray(-jax.nn.log_softmax(logits)[np.arange(len(targets)), targets])


@pytest.mark.parametrize("segments", rest_slow([0, 1, 2], [1]))
def test_the_window_is_that_of_a_model_that_reads_nothing_else(segments: int) -> None:
    model = variant(CONFIG, segments=segments)
    params, documents = params_of(model), documents_of(5 * C, 6 * C - 1, 2 * C + 1)
    reader = reader_of(model, params, documents)
    excerpts = [each for n in range(3) for each in excerpts_of(reader, n, segments, 1)]
    found = reader.read_excerpts("window", excerpts)
    for example, scores in zip(documents.examples, found, strict=True):
        before = np.append(START, example.ids[:-1]).astype(np.int32)
        assert not scores.counted[: (segments + 1) * C].any() and scores.counted[(segments + 1) * C :].all()
        for block in range(segments + 1, math.ceil(len(example.ids) / C)):
            whole, scored = (slice(begin * C, (block + 1) * C) for begin in (block - segments, block))
            expected = nats_of(model, params, before[whole], example.ids[whole])
            own = expected[segments * C :]
            np.testing.assert_allclose(scores.nats[scored], own, rtol=2e-5, atol=2e-6)


def test_excerpts_leave_out_what_is_further_back() -> None:
    documents = documents_of(9 * C, 40 * C, last=2)
    reader = reader_of(CONFIG, params_of(CONFIG), documents)
    assert excerpts_of(reader, 0, 2, 1) == [Excerpt(0, 6, 8, 9)]
    assert excerpts_of(reader, 0, 4, 2) == [Excerpt(0, 3, 7, 9)]
    assert excerpts_of(reader, 0, 8, 2) == [] == excerpts_of(reader, 0, 9, 1)
    every = reader_of(CONFIG, params_of(CONFIG), documents_of(9 * C, 40 * C))
    assert excerpts_of(every, 0, 6, 1) == [Excerpt(0, 2, 8, 9), Excerpt(0, 1, 7, 8)]
    many = excerpts_of(every, 1, 1, 1)
    assert len(many) == 16 and (many[0].end, many[-1].begin) == (40, 1)


def test_a_stopped_memory_knows_nothing_of_what_comes_later() -> None:
    """The last block depends on the first half, and on itself and the two blocks that windows of two layers show."""
    model, params = CONFIG, params_of(CONFIG)
    rows = documents_of(10 * C, 8 * C, 8 * C, last=C)
    changed = []
    for example, middle in zip(rows.examples, (5, 4, 4), strict=True):
        ids, later = example.ids.copy(), slice(middle * C, -3 * C - 1)
        ids[later] = (ids[later] + 3) % model.vocab_size
        changed.append(example._replace(ids=ids))
    results = []
    for documents in (rows, rows._replace(examples=changed)):
        reader = reader_of(model, params, documents)
        results.append(memory_scores(reader, reader.read_by_block("intact"))[0])
    assert results[0]["stopped"]["loss"] == results[1]["stopped"]["loss"]
    assert abs(results[0]["intact"]["loss"] - results[1]["intact"]["loss"]) > 1e-5
    # It knows of the first half.
    assert abs(results[0]["stopped"]["loss"] - results[0]["frozen"]["loss"]) > 1e-5


def document_of_all_tokens(vocabulary: int) -> Documents:
    """Return a document whose inputs are all tokens, each once; the end of it counts."""
    ids = np.append(np.arange(vocabulary - 1), [3]).astype(np.int32)
    weights = (np.arange(len(ids)) >= len(ids) - ANSWER).astype(np.float32)
    return Documents([Example(ids, weights, 0)], None, vocabulary - 1)


@pytest.mark.parametrize("tied", rest_slow([True, False], [True]))
def test_gradient_norms_are_those_of_a_plain_gradient(tied: bool) -> None:
    """Every token occurs once, so the row of the embedding table that it looks up has the gradient of one place.

    Tied embeddings are also weights of the logits, which is no part of the gradient into the inputs.
    """
    model = variant(CONFIG, tie_embeddings=tied)
    params, documents = params_of(model), document_of_all_tokens(model.vocab_size)
    ids = documents.examples[0].ids
    inputs = np.append(model.vocab_size - 1, ids[:-1]).astype(np.int32)

    @jax.jit
    def plain(table: jax.Array) -> jax.Array:
        def loss(table: jax.Array) -> jax.Array:
            own = build(model, {**params, "embedding": {"table": table}})
            hidden, _ = own.hidden(jnp.asarray(inputs[None]), own.init_state(1), aligned=True)
            if tied:
                logits = hidden[0] @ params["embedding"]["table"].T
            else:
                logits = hidden[0] @ params["unembedding"]["kernel"]
            return -jax.nn.log_softmax(logits)[np.arange(len(ids)), ids][-ANSWER:].mean()

        return jax.grad(loss)(table)

    slopes = np.asarray(plain(params["embedding"]["table"]))[inputs]
    expected = np.sqrt(np.square(slopes.reshape(BLOCKS, -1)).sum(axis=1))
    found = gradient_reach(reader_of(model, params, documents))
    assert found is not None and (found["documents"], found["blocks"]) == (1, BLOCKS)
    np.testing.assert_allclose(found["by_blocks_back"], expected[::-1], rtol=1e-4)


def vectors_figures(*blocks: np.ndarray, dtype: str = "float32") -> dict[str, Any]:
    found = MemoryVectors(np.full(blocks[0].shape[1], len(blocks)))
    for block in blocks:
        found.add(block)
    figures = found.figures([*range(blocks[0].shape[0])], dtype)
    assert figures is not None
    return figures


def test_alarms() -> None:
    random = np.random.default_rng(0)
    good, later = random.normal(size=(2, 2, 3, 4, 5))  # (L, B, M, W)
    one_vector = later.copy()
    one_vector[1] = later[1, :, :1] * (1 + 1e-5 * random.normal(size=(3, 4, 5)))
    one_document, broken, nothing = later.copy(), later.copy(), later.copy()
    one_document[0] = later[0, :1]
    broken[0, 1, 2, 3], nothing[1] = np.inf, 0
    assert vectors_figures(good, later)["alarms"] == []
    for vectors, alarm in (
        (one_vector, "layer 1: all vectors of the memory are alike (they differ by "),
        (one_document, "layer 0: the memories of all documents are alike (they differ by "),
        (broken, "layer 0: the memory is not finite (NaN or inf)"),
        (nothing, "layer 1: the memory is zero"),
    ):
        [found] = vectors_figures(good, vectors)["alarms"]
        assert found.startswith(alarm)
    assert vectors_figures(good, good)["alarms"] == [
        "layer 0: the memory no longer changes",
        "layer 1: the memory no longer changes",
    ]
    # One vector, or one document, cannot be like the others.
    assert vectors_figures(good[:, :, :1], later[:, :, :1])["alarms"] == []
    assert vectors_figures(good[:, :1], later[:, :1])["alarms"] == []
    # bfloat16 rounds to 2 or 3 digits.
    near = later[:, :, :1] * (1 + 3e-3 * random.normal(size=later.shape))
    assert vectors_figures(good, near)["alarms"] == []
    assert len(vectors_figures(good, near, dtype="bfloat16")["alarms"]) == 2


def test_a_document_that_ended_is_not_compared() -> None:
    found = MemoryVectors(np.array([1, 3, 0]))
    random = np.random.default_rng(0)
    blocks = random.normal(size=(3, 2, 3, 4, 5))
    for block in blocks:
        found.add(block)
    figures = found.figures([0, 1], "float32")
    assert figures is not None and figures["blocks"] == 1 and figures["change"] is None
    norms = [
        np.linalg.norm(blocks[n][:, rows], axis=-1).mean(axis=(1, 2))
        for n, rows in enumerate(([0, 1], [1], [1]))
    ]
    np.testing.assert_allclose(figures["norm"], norms)


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 2])
def test_a_model_without_memory(last: int) -> None:
    model = dataclasses.replace(CONFIG, memory=BlockSlidingWindowConfig(segments=1))
    found = probe(model, params_of(model), documents_of(*LENGTHS, last=last))
    assert [*found["scores"]] == ["intact", "window"]
    assert [*found["skipped"]] == ["zeroed", "shuffled", "frozen", "stopped"]
    assert found["inspected"]["vectors"] is None is found["inspected"]["writing"]
    norms = np.array(found["gradients"]["by_blocks_back"])
    assert (norms[:3] > 0).all() and not norms[3:].any()  # two layers look one block back each
    plot_memory(found, io.BytesIO(), "")


@pytest.mark.slow
def test_one_short_document() -> None:
    found = probe(CONFIG, params_of(CONFIG), documents_of(C - 1))
    assert [*found["scores"]] == ["intact"] and found["retention"] == [] and found["gradients"] is None
    assert found["skipped"]["shuffled"].startswith("needs two documents")
    assert found["skipped"]["zeroed"] == "no document is long enough"
    plot_memory(found, io.BytesIO(), "")
    memory_tables(found, "")
    [example] = documents_of(4).examples
    uncounted = Documents([example._replace(weights=0 * example.weights)], None, START)
    with pytest.raises(UserError, match="no token of the documents has a loss weight"):
        probe(CONFIG, params_of(CONFIG), uncounted)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_on_a_mesh(ways: tuple[int, int, int]) -> None:
    mesh = sharding.make_mesh(MeshConfig(*ways), jax.devices()[:2])
    model, lengths = variant(CONFIG, num_kv_heads=2), (*LENGTHS, 4 * C)
    plain, spread = (
        probe(model, params, documents_of(*lengths), batch_size=4)
        for params in (
            params_of(model),
            jax.device_put(params_of(model), sharding.param_shardings(params_of(model), mesh)),
        )
    )
    assert spread.keys() == plain.keys()
    one, other = (jax.tree.leaves({**each, "seconds": 0}) for each in (plain, spread))
    for a, b in zip(one, other, strict=True):
        assert b == (pytest.approx(a, rel=1e-3, abs=1e-5) if isinstance(a, float) else a)


@pytest.mark.slow
def test_in_bfloat16() -> None:
    model = variant(CONFIG, dtype="bfloat16")
    found = probe(model, params_of(model), documents_of(*LENGTHS))
    assert found["alarms"] == [] and found["inspected"]["vectors"]["alike_below"] > 5e-3
    attention = found["inspected"]["attention"]
    np.testing.assert_allclose(sum(np.array(attention[name]) for name in ("memory", "past", "own")), 1)


def test_progress_names_every_pass_and_ends_with_all_tokens() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    documents = documents_of(*LENGTHS)
    probe(
        CONFIG,
        params_of(CONFIG),
        documents,
        on_progress=lambda name, *counts: seen.setdefault(name, []).append(counts),
    )
    ways = ["attention", "gradients", "intact", *WAYS]
    assert [*seen] == [f"memory: {name}" for name in ways] + [
        f"memory: {n} blocks back" for n in (1, 2, 4, 8)
    ]
    for counts in seen.values():
        done = [each for each, _ in counts]
        assert done == sorted(done) and done[-1] == counts[-1][1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Any, parrot: dict) -> pathlib.Path:
    return save_run(tmp_path_factory.mktemp("runs") / "parrot", config, parrot)


@pytest.mark.slow
def test_the_command(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures are in the record, and a page of plots beside it. Questions are documents whose answers count."""
    out = run / "passkey.json"
    flags = ["--lengths=2,4", "--keys=3", "--probe=memory", f"--out={out}"]
    assert evaluate.main([f"--checkpoint={run}", *flags]) == 0
    printed = capsys.readouterr().out
    assert "Memory of PassKey retrieval" in printed and f"written to {run / 'passkey.memory.png'}" in printed
    assert (run / "passkey.memory.png").read_bytes().startswith(b"\x89PNG")
    found = read_evaluation(out)
    intact = found.probes["memory"]["scores"]["intact"]
    assert (intact["documents"], found.probes["memory"]["documents"]) == (6, 6)
    assert intact["accuracy"] == pytest.approx(found.metrics["answer_token_accuracy"])
    assert intact["exact_match"] == found.metrics["teacher_forced_exact_match"]
    assert found.probes["memory"]["alarms"][0] == "layer 0: the memory is zero"  # of the parrot
    assert json.loads(out.read_text())["probes"]["memory"]["kind"] == "fam"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task=text", "--probe=memry"],
            "--probe=memry: is unknown; did you mean memory? choose one of memory",
        ),
        (
            ["--probe=memory", "--tasks=copa"],
            "--probe: measures a model on the task passkey or text; give --task",
        ),
    ],
    ids=str,
)
def test_mistakes(arguments: list[str], message: str) -> None:
    """They are found before the checkpoint is read."""
    with pytest.raises(UserError) as caught:
        evaluate.main(["--checkpoint=missing", *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
