"""Find the companions of an imported model (config.json, tokenizer) in the folder of its checkpoint."""

import dataclasses

from etils import epath

from fam_jax.checkpoint.folder import absolute
from fam_jax.config import Config

COMPANIONS = "huggingface"


def companion_folders(config: Config, folder: epath.PathLike) -> list[epath.Path]:
    """Return the folders where the companions of the run in `folder` may be: its own, then that of its base."""
    places = [absolute(place) for place in (folder, config.train.init_from) if place]
    return [place / COMPANIONS for place in (*places, places[-1].parent)]  # init_from may be WORKDIR/STEP


def with_vocabulary_found(config: Config, folder: epath.PathLike) -> Config:
    """Return `config` of the run in `folder` with the current path of its vocabulary.

    A config has the path that the file had when the model was imported. If the folder was moved since, the file is
    looked up among the companions of `folder` and of the run's base.
    """
    name = config.data.vocabulary
    if "/" not in name or epath.Path(name).expanduser().exists():
        return config
    for place in companion_folders(config, folder):
        file = place / name.rpartition("/")[2]
        if file.exists():
            return dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary=str(file)))
    return config
