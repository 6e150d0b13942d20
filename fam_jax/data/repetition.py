"""Where the segment that a row repeats at its end may begin."""

from fam_jax.config import ConfigError, DataConfig


def segment_places(data: DataConfig, body: int, block_size: int) -> int:
    """Return the number of places at which the repeated segment may begin: 0 up to this many less one.

    With data.repeat_before_blocks, the segment ends before as many complete blocks that lie between it and the block
    in which the repetition begins. A window of these blocks then sees none of it.

    Args:
      data: repeat_segment, which is not 0, and repeat_before_blocks.
      body: tokens of a row before the repetition.
      block_size: C, tokens.

    Raises:
      ConfigError: no place is left.
    """
    end = body
    if data.repeat_before_blocks:
        end = (body // block_size - data.repeat_before_blocks) * block_size
    places = end - data.repeat_segment + 1
    if places < 1:
        raise ConfigError(
            f"config.data.repeat_before_blocks: a row has {max(end, 0)} tokens before the last "
            f"{data.repeat_before_blocks} blocks of {block_size}, which is less than repeat_segment "
            f"{data.repeat_segment}; lower one of the two or raise sequence_length"
        )
    return places
