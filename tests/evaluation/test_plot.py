"""Plots are written to files, and do not change an interactive session."""

import io
import pathlib
import subprocess
import sys

from fam_jax.evaluation.plot import plot_loss_by_position, plot_passkey

ROOT = pathlib.Path(__file__).parents[2]
BUCKETS = [{"end": 16, "loss": 3.0}, {"end": 32, "loss": None}, {"end": 64, "loss": 2.0}]


def test_files_and_formats(tmp_path: pathlib.Path) -> None:
    curves = {"one": {"2": 1.0, "8": 0.5}, "other": {"2": 0.25, "8": 0.0}}
    plot_passkey(curves, tmp_path / "passkey.svg", trained_blocks=4, title="a title")
    drawn = (tmp_path / "passkey.svg").read_text()
    assert drawn.startswith("<?xml") and len(drawn) > 1000
    for trained_tokens in (0, 32):
        file = io.BytesIO()
        plot_loss_by_position({"loss": BUCKETS}, file, trained_tokens=trained_tokens)
        assert file.getvalue().startswith(b"\x89PNG")


def test_differences_have_a_panel_of_their_own(tmp_path: pathlib.Path) -> None:
    interval = {"mean": 0.01, "low": 0.005, "high": 0.015}
    ablated = [dict(bucket, difference=interval) for bucket in BUCKETS]
    alone = [dict(bucket, difference={"mean": 0.01, "low": None, "high": None}) for bucket in BUCKETS]
    for name, curves in {
        "one": {"intact": BUCKETS},
        "two": {"intact": BUCKETS, "zeroed": ablated},
        "no interval": {"intact": BUCKETS, "zeroed": alone},
    }.items():
        path = tmp_path / f"{name}.svg"
        plot_loss_by_position(curves, path, trained_tokens=32)
        assert path.read_text().count('id="axes_') == (1 if name == "one" else 2)


def test_the_backend_of_a_session_is_not_changed() -> None:
    code = (
        "import io, sys\nfrom fam_jax.evaluation.plot import plot_loss_by_position\n"
        f"plot_loss_by_position({{'loss': {BUCKETS}}}, io.BytesIO())\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"
