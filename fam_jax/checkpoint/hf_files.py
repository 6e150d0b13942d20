"""Find the companions of an imported model (config.json, tokenizer) in the folder of its checkpoint."""

from etils import epath

from fam_jax.checkpoint.folder import absolute, locate
from fam_jax.config import Config

COMPANIONS = "huggingface"


def companion_folders(config: Config, folder: epath.PathLike) -> list[epath.Path]:
    """Return the folders where the companions of the run in `folder` may be: its own, then that of its base."""
    places = [absolute(folder), *([locate(config.train.init_from)[0]] if config.train.init_from else [])]
    return [place / COMPANIONS for place in places]
