"""Checkpoints of others: links that lead out of them are not followed."""

import dataclasses
import pathlib

import pytest

from fam_jax.checkpoint import Checkpoints, find_vocabulary, load_params
from fam_jax.checkpoint.origin import keep_copies
from fam_jax.config import Config, DataConfig, UserError
from fam_jax.hf.exporting import export_model
from tests.checkpoint.test_folder import STATE, save


@pytest.fixture
def secret(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("{}")
    return tmp_path / "elsewhere" / "secret"


@pytest.mark.parametrize("where", ["1", "1/params", "1/params/d", "1/contents/data.json"])
def test_a_step_with_a_link_out_is_refused(where: str, tmp_path: pathlib.Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    save(run)
    (run / where).rename(outside)
    (run / where).symlink_to(outside)
    with pytest.raises(UserError, match="leads out of its folder"):
        load_params(run)


def test_links_within_a_run_and_to_a_run_are_followed(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    save(run)
    (run / "1" / "params").rename(run / "kept")
    (run / "1" / "params").symlink_to("../kept")
    (tmp_path / "shortcut").symlink_to(run)
    load_params(tmp_path / "shortcut")


def test_an_export_does_not_follow_links_of_a_run(secret: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A checkpoint of somebody else has a link among its companions."""
    run = tmp_path / "run"
    with Checkpoints(run, config=dataclasses.asdict(Config()), keep=1) as checkpoints:
        checkpoints.save(1, STATE, {}, wait=True)
    (run / "huggingface").mkdir()
    (run / "huggingface" / "config.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"config\.json: leads out of its folder"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_a_run_may_not_lead_out(secret: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = Config(data=DataConfig(task="text", vocabulary="x.model", train_files=("a",)))
    (tmp_path / "run" / "vocabulary").mkdir(parents=True)
    (tmp_path / "run" / "vocabulary" / "x.model").symlink_to(secret)
    with pytest.raises(UserError, match=r"x\.model: leads out of its folder"):
        find_vocabulary(config, tmp_path / "run")


def test_what_lies_beside_a_vocabulary_is_not_copied_from_elsewhere(
    secret: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "run").mkdir()
    model = tmp_path / "source" / "x.model"
    model.symlink_to(secret)  # the user named this one
    config = {"data": {"vocabulary": str(model)}}
    keep_copies(tmp_path / "run", config)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "vocabulary" / "x.model").read_text() == "{}"
    (tmp_path / "other").mkdir()
    (tmp_path / "source" / "config.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"config\.json: leads out of its folder"):
        keep_copies(tmp_path / "other", config)  # type: ignore[arg-type]
