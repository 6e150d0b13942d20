"""The vocabulary and the base of a run: their digests, copies in its folder, and where they are now.

The record of a step has the SHA-256 of the vocabulary's file, a digest of the files beside it that change how text is
divided, and a digest of the base's parameters. So all may move, but no other file can take their place. The folder of a
run holds

    huggingface/     companions of an imported model: config.json, tokenizer; a run has those of its base
    vocabulary/      the file of data.vocabulary, if it is not one of the companions
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from fam_jax.checkpoint.folder import (
    CONFIG_FILE,
    CheckpointError,
    absolute,
    json_digest,
    locate,
    read_config,
    saved_steps,
)
from fam_jax.checkpoint.hf_files import COMPANIONS, SOURCE, companion_folders, is_trained
from fam_jax.checkpoint.links import check_inside
from fam_jax.checkpoint.orbax_io import read_record
from fam_jax.config import Config, resolve
from fam_jax.config.data import NAMED_VOCABULARIES, SEQIO
from fam_jax.config.strict_json import dump_json, parse_json

VOCABULARY = "vocabulary"
# Files beside a vocabulary that say which of its pieces are special, and how to use it. The model_type in config.json
# decides the class of a tokenizer.
BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip

# Those of them that change the ids of a text, and what in tokenizer_config.json does; a chat template does not.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OF_IDS = re.compile(r".*_tokens?|added_tokens_decoder|tokenizer_class|legacy|add_prefix_space")

# Models with a class of tokenizers whatever tokenizer_config.json declares, and those with one if it declares none.
OVERRIDING = ("mistral", "qwen2")
DECIDING = ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3")

# Digests by what they are of: "vocabulary", "vocabulary_settings", "task_vocabulary" (of a seqio task) and "base", and
# "vocabulary_class". One is missing if the run has no such thing, or an earlier version of this package saved the step.
Origin = dict[str, str]


def find_vocabulary(
    config: Config, folder: epath.PathLike, step: int | None = None, *, resuming: bool = False
) -> Config:
    """Return `config` of the run in `folder` with the path at which its vocabulary is now.

    The run's own copy comes first, then the path in `config`, then a file of that name in the folders of the base.

    Args:
      config: config of the run.
      folder: folder of the run.
      step: the saved step whose vocabulary is meant; None: the latest.
      resuming: whether the path in `config` comes first, because the user has just named it.

    Raises:
      CheckpointError: there are such files, but none is the one that the run was trained with.
    """
    name = config.data.vocabulary
    if name in NAMED_VOCABULARIES:
        return config
    named, file = epath.Path(name).expanduser(), name.rpartition("/")[2]
    if resuming and named.is_file():
        return config
    own, *base = companion_folders(config, folder)
    places = [absolute(folder) / VOCABULARY / file, own / file]
    places += [
        named,
        *(place / file for place in base),
        *(place.parent / VOCABULARY / file for place in base),
    ]
    found = [place for place in places if place.is_file()]
    for place in found:
        if place != named:
            check_inside(place, place.parent)
    saved = saved_origin(absolute(folder), step)
    right = [
        place
        for place in found
        if all(saved.get(name) in (None, digest) for name, digest in vocabulary_digests(place).items())
    ]
    if found and not right:
        raise wrong_vocabulary(found[0], absolute(folder))
    chosen = str(right[0]) if right and right[0] != named else name
    return dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary=chosen))


def wrong_vocabulary(file: epath.PathLike, folder: epath.Path) -> CheckpointError:
    """Return the error for a vocabulary that the run in `folder` was not trained with."""
    return CheckpointError(
        f"vocabulary {str(file)!r}: is not the one that the run in {folder} was trained with (its SHA-256 differs, or "
        "a file beside it that names special tokens or its class); put that file back, or name it with "
        "--config.data.vocabulary"
    )


def saved_origin(folder: epath.Path, step: int | None = None) -> Origin:
    """Return the digests in the record of a saved step, or of the latest whose record is not damaged; or nothing."""
    for each in reversed(saved_steps(folder)):
        if step in (None, each) and (record := read_record(folder / str(each))):
            return record.get("origin", {})
    return {}


def settle_origin(
    folder: epath.Path,
    config: Mapping[str, Any],
    step: int | None = None,
    forked_from: str = "",
    task_vocabulary: str = "",
) -> tuple[Origin, list[str]]:
    """Return the digests for the record of the steps to come, and the fields that name the same content elsewhere.

    Args:
      folder: folder of the run.
      config: its config, as nested dict.
      step: the saved step that it goes on from; None: the latest.
      forked_from: WORKDIR/STEP of the checkpoint that a new run starts from; empty: none.
      task_vocabulary: digest of a vocabulary that the data task brings along; empty: none.

    Raises:
      CheckpointError: the vocabulary is not the one that the run, or the run that it is forked from, was trained with.
    """
    own = {"task_vocabulary": task_vocabulary} if task_vocabulary else {}
    if not saved_steps(folder):
        if not forked_from:
            return origin_of(config) | own, []
        folder, step = locate(forked_from)
    check_task_vocabulary(folder, step, task_vocabulary)
    saved, now = saved_origin(folder, step), vocabulary_digest(config)
    found = vocabulary_digests(_vocabulary_file(config)) if now else {}
    if any(saved.get(name) not in (None, digest) for name, digest in found.items()):
        raise wrong_vocabulary(config["data"]["vocabulary"], folder)
    before = read_config(folder) if (folder / CONFIG_FILE).exists() else config
    same = []
    if now and now == (saved.get("vocabulary") or _vocabulary_of_old_run(before, folder, step)):
        same.append("data.vocabulary")
    base = config.get("train", {}).get("init_from")
    if base and base != before.get("train", {}).get("init_from") and saved.get("base"):
        same += ["train.init_from"] if same_base(base, saved["base"]) else []
    return saved | found | own, same


def check_task_vocabulary(folder: epath.PathLike, step: int | None, digest: str) -> None:
    """Check the vocabulary that a data task brings along against the one that a saved step was trained with.

    Args:
      folder: folder of the run.
      step: the saved step; None: the latest.
      digest: of the vocabulary as it is now; empty: there is none to check.

    Raises:
      CheckpointError: it is another one.
    """
    saved = saved_origin(absolute(folder), step).get("task_vocabulary")
    if saved and digest and digest != saved:
        raise CheckpointError(
            f"{folder}: was trained with another vocabulary than the data task has now; let the task use the former "
            "vocabulary again"
        )


def _vocabulary_of_old_run(config: Mapping[str, Any], folder: epath.Path, step: int | None) -> str:
    """Return the digest of the vocabulary of a run whose steps do not have it."""
    return vocabulary_digest(dataclasses.asdict(find_vocabulary(resolve(config), folder, step)))


def origin_of(config: Mapping[str, Any]) -> Origin:
    """Return the digests of the vocabulary and of the base that a config names now."""
    found = vocabulary_digests(_vocabulary_file(config)) if vocabulary_digest(config) else {}
    if base := config.get("train", {}).get("init_from"):
        folder, step = locate(base)
        found["base"] = params_digest(
            folder, step if step is not None else max(saved_steps(folder), default=0)
        )
    return {name: digest for name, digest in found.items() if digest}


def vocabulary_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the file that data.vocabulary names; empty if it names none, or there is no such file."""
    file = _vocabulary_file(config)
    return file_digest(file) if str(file) not in NAMED_VOCABULARIES and file.is_file() else ""


def _vocabulary_file(config: Mapping[str, Any]) -> epath.Path:
    return epath.Path(config.get("data", {}).get("vocabulary", NAMED_VOCABULARIES[0])).expanduser()


def vocabulary_digests(file: epath.Path) -> Origin:
    """Return what identifies the file of a vocabulary in the record of a step."""
    found = {"vocabulary": file_digest(file)}
    if file.suffix == ".json":
        found |= {"vocabulary_settings": settings_digest(file), "vocabulary_class": _class_by_model(file)}
    return found


def _class_by_model(file: epath.Path) -> str:
    """Return what config.json beside a tokenizer.json says about the tokenizer's class; "any" if it does not matter."""
    found = [_value(file.parent / name) for name in ("config.json", SETTINGS[0])]
    config, settings = (value if isinstance(value, dict) else {} for value in found)
    family = str(config.get("model_type"))
    if family in OVERRIDING:
        return family
    if settings.get("tokenizer_class"):
        return "any"
    return str(config.get("tokenizer_class") or (family if family in DECIDING else "any"))


def settings_digest(file: epath.Path) -> str:
    """Return a digest of what the files beside a tokenizer.json say; empty for other vocabularies, which need none.

    It covers the values and not their layout, so another program may rewrite the files.
    """
    if file.suffix != ".json":
        return ""
    found = {name: _value(file.parent / name) for name in SETTINGS if (file.parent / name).is_file()}
    return json_digest(found)


def _value(file: epath.Path) -> Any:
    if not file.is_file():
        return None
    try:
        value = parse_json(file.read_bytes())
    except ValueError:
        return file_digest(file)
    if file.name != SETTINGS[0] or not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if OF_IDS.fullmatch(name)}


def file_digest(file: epath.Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def params_digest(folder: epath.Path, step: int) -> str:
    """Return a digest of the parameters of a saved step; empty if there is no such step."""
    record = read_record(folder / str(step)) if step in saved_steps(folder) else {}
    return json_digest(record["params"]) if record else ""


def same_base(place: str, digest: str) -> bool:
    """Return whether `place`, such as WORKDIR or WORKDIR/STEP, has the parameters of a digest."""
    folder, step = locate(place)
    return digest in [params_digest(folder, each) for each in saved_steps(folder) if step in (None, each)]


def keep_copies(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """Copy the vocabulary into the folder of a run, with the companions of the base if they are of that vocabulary.

    Files that are there already stay as they are.

    Raises:
      OSError: a file cannot be read or written.
      UserError: a link leads out of the folder that it is in.
    """
    data, base = config.get("data", {}), config.get("train", {}).get("init_from")
    digest, file = vocabulary_digest(config), epath.Path(data.get("vocabulary", "")).expanduser()
    companions = locate(base)[0] / COMPANIONS if base else None
    if companions is not None and companions.is_dir() and not (folder / COMPANIONS).exists():
        files = [found for found in companions.iterdir() if found.is_file()]
        # The vocabulary of a seqio task is not known here.
        if data.get("task", "").startswith(f"{SEQIO}:") or (digest and digest in map(file_digest, files)):
            _copy(files, folder / COMPANIONS)
            if is_trained(base) and (folder / COMPANIONS / SOURCE).exists():
                (folder / COMPANIONS / SOURCE).write_text(f"{dump_json({'source': None})}\n")
    kept = [place / file.name for place in (folder / VOCABULARY, folder / COMPANIONS)]
    same = [copy for copy in kept if copy.is_file() and file_digest(copy) == digest]
    if digest and vocabulary_digests(file) not in map(vocabulary_digests, same):
        beside = [file.parent / name for name in BESIDE]
        _copy([file, *(other for other in beside if other.is_file())], folder / VOCABULARY, named=file)


def _copy(files: list[epath.Path], target: epath.Path, named: epath.Path | None = None) -> None:
    """Copy files into a folder. Links may not lead out of their folder, except that of the file that the user named."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file != named:
            check_inside(file, file.parent)
        unfinished = target / f".{file.name}.unfinished"
        unfinished.write_bytes(file.read_bytes())
        unfinished.replace(target / file.name)
