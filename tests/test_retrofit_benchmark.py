"""The benchmarks `retrofit` and `lora_step`: their configs, summaries and plot."""

import dataclasses
import json
import math
import pathlib

import pytest

from benchmarks import lora_step, retrofit
from benchmarks.retrofit_plot import draw
from benchmarks.retrofit_settings import BLOCK, CONTEXT, FULL, base_flags, retrofit_flags
from fam_jax.config import Config, to_json
from fam_jax.config.format1 import FORMAT
from fam_jax.data.documents import find_files
from fam_jax.evaluation.text import FIRST_EDGE
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.window import BlockSlidingWindowConfig, FullConfig
from launch.cli import Parser, load_config


def buckets(losses: list[float]) -> list[dict[str, float]]:
    """Return buckets like those of an evaluation; a bucket with loss x has 10 x tokens."""
    edges = [0, *(FIRST_EDGE * 2**i for i in range(len(losses)))]
    spans = zip(edges[:-1], edges[1:], losses, strict=True)
    return [{"begin": a, "end": b, "loss": loss, "tokens": 10 * loss} for a, b, loss in spans]


def test_the_loss_within_the_context_leaves_out_later_tokens() -> None:
    count = round(math.log2(CONTEXT / FIRST_EDGE)) + 1
    inside = [1.0 + i for i in range(count)]
    expected = sum(x * x for x in inside) / sum(inside)
    assert retrofit.in_context(buckets([*inside, 100.0, 100.0])) == pytest.approx(expected)


def test_patterns_find_modules_of_every_depth(tmp_path: pathlib.Path) -> None:
    names = {"a.py", "b/c.py", "b/d/e/f.py", "b/d/e/g.py"}
    for name in (*names, "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files(retrofit.patterns(tmp_path), (".txt",), "--files")
    assert {str(path.relative_to(tmp_path)) for path in found} == names


@pytest.mark.parametrize("variant", retrofit.VARIANTS)
def test_the_flags_make_configs(variant: str, tmp_path: pathlib.Path) -> None:
    base = config_of("configs/text.py:full", base_flags(tmp_path, FULL))
    assert base.model.memory == FullConfig(context=CONTEXT) and base.data.sequence_length == CONTEXT
    workdir = tmp_path / "imported"
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(base).replace("{", f'{{"format": {FORMAT},', 1))
    config = config_of(
        f"configs/retrofit.py:{workdir}{',bswa' if variant == 'bswa' else ''}",
        retrofit_flags(tmp_path, variant, FULL),
    )
    memory = FamConfig(segments=1, length=16) if variant == "fam" else BlockSlidingWindowConfig(segments=1)
    assert (config.model.block_size, config.model.memory) == (BLOCK, memory)
    assert config.train.steps == FULL.steps[variant]


def config_of(file: str, flags: list[str]) -> Config:
    """Return the config of `launch.train` with flags, the first of which names the config file."""
    assert flags[0] == f"--config={file}"
    arguments = Parser("train", "", config=True).parse_args(flags)
    return load_config(arguments.config, arguments.overrides)


def test_the_picture(tmp_path: pathlib.Path) -> None:
    results = {
        "by_position": {name: buckets([3.0, 2.0, 1.5]) for name in (*retrofit.LONG, *retrofit.VARIANTS)},
        "passkey": {name: {"2": 1.0, "4": 0.5} for name in (*retrofit.VARIANTS, "fam_seed2", "fam_seed3")},
        "longest_filler": 256,
        "in_context": dict.fromkeys((*retrofit.TEXT, *retrofit.VARIANTS), 2.0),
        "ablations": {"zeroed": buckets([3.0, 2.5, 2.0])},
    }
    draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    retrofit.show(results)


@pytest.mark.slow
def test_steps_of_lora_and_of_full_fine_tuning(tmp_path: pathlib.Path) -> None:
    lora_step.main(["--quick", f"--json={tmp_path}/record.json"])
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    assert results.keys() == lora_step.SIDES.keys()
    full, adapted, narrow = results.values()
    assert full["trained_parameters"] == full["parameters"]
    # The initial FAM is trained, so the frozen parameters are fewer than all of the model's.
    assert adapted["parameters"] - adapted["trained_parameters"] < full["parameters"]
    assert narrow["state_bytes"] < adapted["state_bytes"]
    assert all(row["step_bytes"] > 0 and row["seconds"]["median"] > 0 for row in results.values())
    assert full["ratio"]["median"] == 1


def test_the_proportions_of_the_measured_model() -> None:
    model = lora_step.FULL.model
    assert model.num_heads == 4 * model.num_kv_heads and model.ff_dim == 3.5 * model.model_dim
    assert dataclasses.asdict(lora_step.SIDES["lora"])["rank"] == 64
