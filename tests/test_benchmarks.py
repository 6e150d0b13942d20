"""Benchmarks run, write complete records, and compare implementations of the same function. No test checks times."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import drift, evaluation, generation, memories, passkey, training
from benchmarks.arithmetic import count_flops
from benchmarks.naive import naive_hidden
from benchmarks.timing import LEAST_ROUNDS, Times, interleave
from benchmarks.workload import (
    QUICK,
    Hidden,
    blockwise_hidden,
    random_batch,
    random_parameters,
    with_blocks,
)
from configs.passkey import get_config
from fam_jax.config import Config, UserError, resolve
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import Transformer, from_dict, to_dict
from fam_jax.training.state import model_structure
from tests.flags import xla_flags
from tests.model.tiny import variant
from tests.variants import rest_slow

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = dataclasses.replace(with_blocks(QUICK.model, 16), vocab_size=11)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the records of `benchmarks.run --quick`, compiled for short compile time instead of speed."""
    out = tmp_path_factory.mktemp("bench")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", f"--out={out}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla_flags()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert "by operations" in result.stdout and "Memory while streaming" in result.stdout
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def assert_spread(found: dict[str, float], *, positive: bool = True) -> None:
    assert found.keys() == {"median", "q1", "q3", "rounds"}
    assert found["q1"] <= found["median"] <= found["q3"]
    assert found["rounds"] >= LEAST_ROUNDS
    assert np.isfinite(found["median"]) and (found["q1"] > 0 or not positive)


@pytest.mark.slow
def test_records_tell_what_was_run(records: dict[str, Any]) -> None:
    assert records.keys() == {"training", "decoding"}
    for name, record in records.items():
        assert record["benchmark"] == name
        assert record["command"].startswith(f"python -m benchmarks.{name} ")
        environment = record["environment"]
        fields = {
            "date",
            "git_revision",
            "python",
            "packages",
            "platform",
            "cpu",
            "cores",
            "load_average",
            "device",
        }
        assert environment.keys() == fields
        assert environment["packages"]["jax"] == jax.__version__
        assert record["settings"]["quick"] is True
    assert records["training"]["settings"]["workload"]["seed"] == records["decoding"]["settings"]["seed"] == 0


@pytest.mark.slow
def test_training_record(records: dict[str, Any]) -> None:
    results = records["training"]["results"]
    assert results.keys() == {"memory", "gradients", "attention"}
    memory = results["memory"]["16"]
    assert memory["fam_length"] == 1 and memory["fam_per_token"] == 1 / 16
    assert memory["expected_ratio"] > 1
    assert memory["flops"]["bswa"]["fam_dense"] == 0
    for found in (
        memory["ratio"],
        *memory["tokens_per_second"].values(),
        results["attention"]["16"]["ratio"],
    ):
        assert_spread(found)
    gradients = results["gradients"]["16"]
    assert len(gradients["seconds"]) == 8
    for name in ("naive_ratio", "deferral_ratio", "forward_ratio", "gradient_ratio"):
        assert_spread(gradients[name])
    for part in ("forward", "backward"):
        # Differences of short times may be negative.
        assert_spread(gradients[f"{part}_overhead"], positive=False)
        assert_spread(gradients[f"all_chains_{part}"], positive=False)


@pytest.mark.slow
def test_naive_form_has_the_same_loss_and_gradients(records: dict[str, Any]) -> None:
    difference = records["training"]["results"]["gradients"]["16"]["difference"]
    assert difference["loss"] < 1e-5
    assert difference["gradient"] < 1e-4


@pytest.mark.slow
def test_decoding_record(records: dict[str, Any]) -> None:
    results, settings = records["decoding"]["results"], records["decoding"]["settings"]
    samples = results["stream"]["samples"]
    assert [sample["tokens"] for sample in samples] == settings["marks"]
    assert all(sample["peak_rss_bytes"] > 0 and sample["tokens_per_second"] > 0 for sample in samples)
    assert results["stream"]["live_arrays_equal"]
    decode = results["decode"]
    assert decode["positions"] == {"near": settings["chunk_tokens"], "far": settings["marks"][-1]}
    for found in (decode["ratio"], *decode["seconds_per_token"].values()):
        assert_spread(found)


@pytest.mark.parametrize("segments", rest_slow([0, 2], [0]))
def test_naive_form_with_other_memory_segments(segments: int) -> None:
    config = variant(TINY, block_size=8, length=3, segments=segments)
    random = np.random.default_rng(0)
    graphdef, abstract = model_structure(Config(model=config))
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), to_dict(abstract))
    tokens = random.integers(0, config.vocab_size, (2, 32))

    def outputs(form: Hidden) -> jax.Array:
        return jax.jit(lambda params: form(nnx.merge(graphdef, from_dict(abstract, params)), tokens))(params)

    naive, blockwise = outputs(naive_hidden), outputs(blockwise_hidden)
    assert np.abs(naive).max() > 0.1
    np.testing.assert_allclose(naive, blockwise, atol=1e-5)


def test_naive_form_rejects_options_that_it_lacks() -> None:
    tokens = np.zeros((1, 16), np.int32)
    bswa = {"memory": BlockSlidingWindowConfig()}
    for change in (bswa, {"window": 5}, {"positions": "zero"}, {"block_size": 10}):
        model = nnx.eval_shape(lambda change=change: Transformer(variant(TINY, **change), rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="naive form"):
            naive_hidden(model, tokens)


def test_operations_are_those_of_the_compiled_products() -> None:
    """XLA counts the body of a scan once, so the model has one layer and one block. It also counts element-wise ops."""
    memory = BlockSlidingWindowConfig()
    sizes = {"model_dim": 64, "head_dim": 32, "ff_dim": 256, "block_size": 64, "vocab_size": 64}
    config = variant(TINY, num_layers=1, memory=memory, **sizes)
    params = to_dict(model_structure(Config(model=config))[1])
    loss = jax.jit(training.make_loss(config))
    work = dataclasses.replace(QUICK, model=config)
    analysis = loss.lower(params, random_batch(work)).compile().cost_analysis()
    counted = count_flops(config, work.batch, work.length)
    products = counted.tokens_dense + counted.tokens_attention
    assert products <= analysis["flops"] <= 1.25 * products


def test_fam_adds_its_share_of_the_tokens_operations() -> None:
    config = dataclasses.replace(TINY, vocab_size=1)
    flops = count_flops(config, batch=4, length=16 * 1024)
    logits = 4 * 16 * 1024 * 2 * config.model_dim
    assert flops.fam_dense / (flops.tokens_dense - logits) == pytest.approx(1 / 16, rel=1e-3)
    # Each of the T tokens sees M vectors besides 2C keys.
    assert flops.fam_read / flops.tokens_attention == pytest.approx(1 / 32)


def test_interleave_takes_turns() -> None:
    order: list[str] = []
    times = interleave({name: lambda name=name: (order.append(name), _wait())[1] for name in "ab"}, seconds=0)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert [round_.keys() for round_ in times.rounds] == [{"a", "b"}] * LEAST_ROUNDS


def _wait() -> None:
    """Wait long enough that `interleave` does not repeat the call."""
    time.sleep(0.06)


def test_ratios_are_taken_within_a_round() -> None:
    times = Times([{"a": 2.0, "b": 1.0}, {"a": 60.0, "b": 20.0}, {"a": 4.0, "b": 1.0}])
    assert times.ratio("a", "b").median == 3
    assert times.seconds()["a"].median == 4


@pytest.mark.parametrize("text", ["64,x", "24", "0", "128"])
def test_block_sizes_that_cannot_be_measured(text: str) -> None:
    with pytest.raises(UserError, match="--block-sizes"):
        training.block_sizes(text, QUICK)


def some_demo(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """Write the files of a finished demo that `benchmarks.passkey` reads."""
    row = {
        "exact_match": 0.5,
        "teacher_forced_exact_match": 0.5,
        "answer_token_accuracy": 0.75,
        "questions": 4,
        "tokens_read": 119,
    }
    for name in passkey.VARIANTS:
        (folder / name).mkdir(parents=True)
        result = {"command": "c", "versions": {}, "config": {}, "details": {"groups": {"2": row, "4": row}}}
        (folder / name / "result.json").write_text(json.dumps(result))
        line = {"loss": 1.0, "exact_match": 0.5, "stage_blocks": 2, "tokens_per_second": 3.0}
        lines = [{"step": step, **line} for step in (10, 50, 60)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {name: {"2": 0.5, "4": 0.5} for name in passkey.VARIANTS}
    (folder / "passkey.json").write_text(json.dumps({"models": models, "seconds": 1.0, "seed": seed}))
    return folder


def test_runs_of_the_demo_are_gathered(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [some_demo(tmp_path / str(seed), seed) for seed in (3, 5)]
    out = tmp_path / "docs" / "passkey.json"
    passkey.main([*map(str, folders), f"--json={out}"])
    assert "fam" in capsys.readouterr().out
    runs = json.loads(out.read_text())["runs"]
    assert [run["seed"] for run in runs] == [3, 5]
    assert f"--seed=3 --workdir={folders[0]} --lengths=2,4" in runs[0]["command"]
    found = runs[1]["models"]["bswa_m1"]
    assert found["lengths"]["4"]["answer_token_accuracy"] == 0.75 and found["steps"] == 60
    assert [point["step"] for point in found["course"]] == [50]


def test_an_unfinished_demo_is_not_gathered(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = some_demo(tmp_path, 0)
    (folder / "bswa_m1" / "result.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        passkey.main([str(folder)])
    assert stopped.value.code == 2
    assert f"run python -m launch.demo --workdir={folder}" in capsys.readouterr().err


def test_directions_are_compared_without_their_norms() -> None:
    same = np.tile(np.array([3.0, 4.0]), (1, 5, 2, 1)) * np.arange(1, 6)[None, :, None, None]
    opposite = same * np.where(np.arange(5) % 5 < 4, 1, -1)[None, :, None, None]
    found = drift._directions(np.concatenate([same, opposite]))
    np.testing.assert_allclose(found["norm"], [15, 15])
    # Four at distance 2/5 from the mean, one at 8/5.
    np.testing.assert_allclose(found["direction_spread"], [0, 0.8], atol=1e-12)


def test_misread_tokens_are_counted_by_place() -> None:
    answers, tokens = np.array([[1, 2], [1, 3], [1, 3]]), np.array([[1, 3], [2, 2], [1, 2]])
    first, second = drift._misread(answers, tokens, {1: "one", 2: "two", 3: "three"})
    assert first == {"wrong": 1 / 3, "pairs": {"one as two": 1}}
    assert second == {"wrong": 1.0, "pairs": {"three as two": 2, "two as three": 1}}


@pytest.mark.slow
def test_drift_follows_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = resolve(get_config("smoke"))
    params = random_parameters(resolved.model, seed=0)
    found = drift.measure(resolved, params, blocks=6, keys=4, dtypes=("float32", "bfloat16"))
    assert found["dtypes"].keys() == {"float32", "bfloat16"}
    for each in found["dtypes"].values():
        assert [row["blocks"] for row in each["course"]] == [1, 2, 4, 6]
        norms = np.array([row["norm"] for row in each["course"]])
        assert norms.shape == (4, 2) and (np.diff(norms, axis=0) > 0).all()  # the residual accumulates
        assert each["course"][0]["direction_spread"][0] > 0
        assert all(share < 0.01 for row in each["course"] for share in row["unchanged"])
        assert len(each["misread"]) == 6  # a space, five digits
        assert each["exact_match"] == 0
    distances = np.array([row["bfloat16"] for row in found["difference"]])
    assert distances.shape == (4, 2) and (distances > 0).all() and (distances < 0.1).all()
    drift.show(found)
    assert "from those in float32" in capsys.readouterr().out
    # In chunks of other lengths, the same.
    again = drift.measure(resolved, params, blocks=6, keys=4, chunk_blocks=1)
    (course,) = (each["course"] for each in again["dtypes"].values())
    np.testing.assert_allclose(
        [row["norm"] for row in course],
        [row["norm"] for row in found["dtypes"]["float32"]["course"]],
        rtol=1e-5,
    )
    assert again["difference"] == []


@pytest.mark.slow
def test_generation_record(tmp_path: pathlib.Path) -> None:
    generation.main(["--lengths=300", f"--json={tmp_path / 'generation.json'}"])
    record = json.loads((tmp_path / "generation.json").read_text())
    assert [sample["tokens"] for sample in record["results"]["samples"]] == [300]
    assert all(sample["peak_rss_bytes"] > 2**27 for sample in record["results"]["samples"])
    assert record["command"].startswith("python -m benchmarks.generation --lengths=300 ")


def test_memories_are_timed_beside_fam(capsys: pytest.CaptureFixture[str]) -> None:
    found = memories.measure(("bswa_m1",), 0.0, 0, quick=True)
    assert found.keys() == {"fam", "bswa_m1"}
    for row in found.values():
        for name in ("tokens_per_second", "milliseconds_per_token"):
            assert_spread(dataclasses.asdict(row[name]))
    assert found["fam"]["tokens_time_ratio"].median == found["fam"]["milliseconds_time_ratio"].median == 1
    assert found["bswa_m1"]["state_floats"] > 0
    memories.show(found)
    assert "BSWA, m = 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        memories.main(["--arms=no_such"])


def test_the_evaluation_of_documents_is_compared_with_reading_them(tmp_path: pathlib.Path) -> None:
    evaluation.main(["--quick", f"--json={tmp_path}/found.json"])
    record = json.loads((tmp_path / "found.json").read_text())
    found = record["results"]
    assert record["command"].startswith("python -m benchmarks.evaluation --quick")
    for name, seeds in found["padding"].items():
        assert all(1 <= each["refilled"] < min(1.1, each["sorted"]) for each in seeds), name
    # The bytes that exist do not depend on the length of documents.
    assert len({*found["memory"].values()}) == 1 and len(found["memory"]) == 2
    tokens = found["throughput"]["tokens"]
    # Questions are long beside documents of 50 tokens.
    assert 1 <= tokens["evaluate"] / tokens["read"] < 2 and found["throughput"]["ratio"]["median"] > 0
