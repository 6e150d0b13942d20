"""The JSON schema of files of results."""

import importlib.resources
import json
import pathlib
from typing import Any

import jsonschema


def schema() -> dict[str, Any]:
    return json.loads(
        importlib.resources.files("fam_jax.evaluation").joinpath("results.schema.json").read_text()
    )


def check_results(found: dict[str, Any] | pathlib.Path) -> None:
    """Fail if results, or a file of results, are not as the schema says."""
    values = json.loads(found.read_text()) if isinstance(found, pathlib.Path) else found
    jsonschema.Draft202012Validator(schema()).validate(values)
