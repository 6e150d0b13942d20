"""A user's turn in the chat template of a tokenizer, divided into what stands around the message."""

from typing import Any, NamedTuple

from fam_jax.config import DataConfig, UserError
from fam_jax.data.records import RowError
from fam_jax.data.tokenizer_folder import CHAT_TEMPLATE
from fam_jax.data.vocabulary import bos_ids


class Turn(NamedTuple):
    """What a chat template puts around the message of a user. All are empty if there is no template."""

    # From the beginning of the chat to the message, without the start token that every stream gets anyway.
    before: str = ""
    # From the message to where the answer begins.
    after: str = ""
    # Control token that ends an answer; empty: none.
    end: str = ""


def user_turn(data: DataConfig, vocabulary: Any) -> Turn:
    """Return the turn of a user in the chat template that `data` names, or that lies beside the vocabulary.

    Raises:
      UserError: there is no chat template, or it does not show the message of a user once and as it is.
      ConfigError: the template is damaged.
    """
    from fam_jax.data.instructions import chat_template  # imports TensorFlow
    from fam_jax.data.token_weights import TokenWeights

    template = chat_template(data, vocabulary)
    if template is None:
        raise UserError(
            f"the vocabulary {data.vocabulary!r} has no chat template beside it; put one there as {CHAT_TEMPLATE}, or "
            "do not ask by chat"
        )
    try:
        before, after = template.around_message()
    except RowError as error:  # its advice is for training data
        raise UserError(f"{str(error).rpartition('; ')[0]}; do not ask by chat") from error
    if bos_ids(vocabulary, data):
        before = before.removeprefix(TokenWeights(vocabulary).named.get("bos_token", ""))
    return Turn(before, after, template.end)
