"""Find the companions of an imported model (config.json, tokenizer) in the folder of its checkpoint."""

from typing import Any

from etils import epath

from fam_jax.checkpoint.folder import CheckpointError, absolute, locate, read_config
from fam_jax.config import Config, UserError, resolve
from fam_jax.config.data import SEQIO
from fam_jax.config.strict_json import parse_json

COMPANIONS = "huggingface"
# A file among them with the path of the folder that was imported; null if the weights were trained since.
SOURCE = "source.json"
# Files among the companions that name the tokens that end a text.
NAME_END_IDS = ("config.json", "generation_config.json")


def companion_folders(config: Config, folder: epath.PathLike) -> list[epath.Path]:
    """Return the folders where the companions of the run in `folder` may be: its own, then that of its base."""
    places = [absolute(folder), *([locate(config.train.init_from)[0]] if config.train.init_from else [])]
    return [place / COMPANIONS for place in places]


def is_trained(base: str) -> bool:
    """Return whether a base (train.init_from) is a run, whose weights are no longer those of an imported model."""
    try:
        return bool(base) and bool(resolve(read_config(locate(base)[0])).train.init_from)
    except UserError:  # the base is gone
        return False


def end_ids(config: Config, folder: epath.PathLike) -> list[int]:
    """Return the ids that end a text, as the companions of an imported model say; none if there are no companions.

    A run that began with an imported model (config.train.init_from), or with such a run, inherits the ids unless its
    vocabulary is another.

    Raises:
      CheckpointError: a file cannot be read, or its ids are not whole numbers.
    """
    place, vocabulary = absolute(folder), config.data.vocabulary.rpartition("/")[2]
    # A seqio task brings its vocabulary along, and data.vocabulary does not name it.
    same, seen = config.data.task.startswith(f"{SEQIO}:") or not config.train.init_from, set()
    while not (place / COMPANIONS).is_dir() and config.train.init_from and place not in seen:
        seen.add(place)
        place, _ = locate(config.train.init_from)
        try:
            config = resolve(read_config(place))
        except CheckpointError:  # the base is gone
            return []
        same = same or config.data.vocabulary.rpartition("/")[2] == vocabulary
    if not same and not (place / COMPANIONS / vocabulary).exists():
        return []
    # Files may also name ids that no token of the model has, such as -1.
    return [token for token in named_end_ids(place / COMPANIONS) if 0 <= token < config.model.vocab_size]


def named_end_ids(companions: epath.PathLike) -> list[int]:
    """Return the ids that end a text, as config.json and generation_config.json in a folder say.

    Raises:
      CheckpointError: a file cannot be read, or its ids are not whole numbers.
    """
    folder = epath.Path(companions)
    return sorted({token for name in NAME_END_IDS for token in _end_ids_in(folder / name)})


def _end_ids_in(path: epath.Path) -> list[int]:
    """Return `eos_token_id` of a file, of a model with a vision tower that of its text part too."""
    if not path.exists():
        return []
    try:
        content = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    groups = [content, content.get("text_config")] if isinstance(content, dict) else []
    named: list[Any] = [group.get("eos_token_id") for group in groups if isinstance(group, dict)]
    found = [token for value in named for token in (value if isinstance(value, list) else [value])]
    found = [token for token in found if token is not None]
    if not all(type(token) is int for token in found):
        raise CheckpointError(f"{path}: eos_token_id: expected token ids, got {named}; correct it")
    return found
