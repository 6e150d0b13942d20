"""What stands before a text: the start token (BOS), for models that were trained with one."""

from typing import Any

from fam_jax.config import ConfigError, DataConfig


def bos_ids(vocabulary: Any, data: DataConfig) -> list[int]:
    """The id to put before a text if `data.add_bos`, else nothing.

    Raises:
      ConfigError: the vocabulary has no such token.
    """
    if not data.add_bos:
        return []
    bos = vocabulary.bos_id
    if bos is None or bos < 0:
        raise ConfigError(
            f"config.data.add_bos: the vocabulary {data.vocabulary!r} has no start token (BOS); set it to false"
        )
    return [bos]


def first_input(vocabulary: Any, data: DataConfig) -> int:
    """What a model sees when it is to predict a text's first token: BOS, or the end of the text before."""
    return (*bos_ids(vocabulary, data), vocabulary.eos_id or 0)[0]
