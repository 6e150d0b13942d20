"""The folder of a checkpoint that holds what an imported model came with: its tokenizer, its config.json."""

import dataclasses

from etils import epath

from fam_jax.checkpoint.folder import absolute
from fam_jax.config import Config

COMPANIONS = "huggingface"


def companion_folders(config: Config, folder: epath.PathLike) -> list[epath.Path]:
    """Where the companions of the run in `folder` may lie: there, or in the run that it began with."""
    places = [absolute(place) for place in (folder, config.train.init_from) if place]
    return [place / COMPANIONS for place in (*places, places[-1].parent)]  # a run may begin with workdir/STEP


def with_vocabulary_found(config: Config, folder: epath.PathLike) -> Config:
    """`config` of the run in `folder`, with its vocabulary where it lies now.

    Configs name the file by the path that it had when the model was imported. If there is none any more, because the
    folder was moved, it is the one among the companions of `folder`, or of the run's base.
    """
    name = config.data.vocabulary
    if "/" not in name or epath.Path(name).expanduser().exists():
        return config
    for place in companion_folders(config, folder):
        file = place / name.rpartition("/")[2]
        if file.exists():
            return dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary=str(file)))
    return config
