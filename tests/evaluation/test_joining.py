"""Ids at the joins of document, context and continuation are those of the whole text, under any vocabulary."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import UserError
from fam_jax.evaluation.item import NO_DOCUMENT, text_document
from fam_jax.evaluation.joining import Joiner
from tests.evaluation.fake import Bytes, joiner

CORPUS = "The cat sat. The cat, the dog!\n\nQuestion: who sat?\nAnswer: the cat. (U.S.)\n\n" * 20


class Pieces:
    """A vocabulary of the tokenizers library."""

    eos_id, bos_id = 0, 0

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


@functools.cache
def vocabulary(kind: str) -> Any:
    """Return a trained vocabulary that splits as a family of open models does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "bytes":
        return Bytes()
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "llama3":  # punctuation takes the newlines behind it along
        split = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), byte_level]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:  # a mark before every word, and before the text
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*map(chr, (10, *range(33, 127)))]
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<s>"])
    tokenizer.train_from_iterator([CORPUS], trainer)
    return Pieces(tokenizer)


def joiner_of(kind: str, *begin: int) -> Joiner:
    return Joiner(vocabulary(kind), vocabulary(kind).vocab_size, begin, 0)


KINDS = ["bytes", "llama3", "llama2"]
TEXTS = st.text(st.sampled_from("The cat sat. \n\n(U.S.)!,Q:"), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(context=TEXTS, continuation=TEXTS.filter(str.strip))
def test_context_and_continuation_have_the_ids_of_the_whole(
    kind: str, context: str, continuation: str
) -> None:
    own = joiner_of(kind)
    before, ids = own.join(own.prefix(NO_DOCUMENT), context, continuation)
    whole = own.encode(context + continuation)
    alone = own.encode(context.rstrip())
    assert len(ids) > 0
    if len(before) == 1 and before[0] == 0 and [0, *whole] == [*before, *ids]:
        return  # no context: predicted from the token that begins texts
    assert [*before, *ids] == whole
    assert [*before] == alone[: len(before)]
    # No later cut would do.
    cut = len(before)
    assert cut == len(whole) - 1 or cut == len(alone) or whole[cut] != alone[cut]


DOCUMENTS = st.lists(
    st.sampled_from(["The cat sat.", "the dog!", "(U.S.)", "Question: who?", "\n\n", "sat."]),
    min_size=3,
    max_size=60,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(parts=DOCUMENTS, question=st.sampled_from(["\n\nQuestion: who sat?\nAnswer:", " and", "!"]))
def test_a_document_and_its_question_have_the_ids_of_the_whole(
    kind: str, parts: list[str], question: str
) -> None:
    own = joiner_of(kind, 0)
    text = " ".join(parts).strip()
    prefix = own.prefix(text_document(text))
    context, ids = own.join(prefix, question, " the cat")
    assert [*prefix.ids, *context, *ids] == [0, *own.encode(text + question + " the cat")]
    assert [*prefix.ids, *own.prompt(prefix, question)] == [0, *own.encode(text + question)]


def test_the_cut_of_known_texts() -> None:
    own = joiner()
    start = own.prefix(NO_DOCUMENT)
    context, ids = own.join(start, "ab \n", "cd")
    assert Bytes().decode(context.tolist()) == "ab" and Bytes().decode(ids.tolist()) == " \ncd"
    context, ids = own.join(start, "", "cd")
    assert context.tolist() == [0] and Bytes().decode(ids.tolist()) == "cd"
    begun = joiner(1)
    context, ids = begun.join(begun.prefix(NO_DOCUMENT), "", "cd")
    assert context.tolist() == [] and begun.prefix(NO_DOCUMENT).ids.tolist() == [1]


def test_continuations_without_tokens_are_refused() -> None:
    for text in ("", " \n"):
        with pytest.raises(UserError, match="has no tokens; leave the item out"):
            joiner().join(joiner().prefix(NO_DOCUMENT), "ab", text)


def test_a_long_document_waits_with_its_last_word_only() -> None:
    text = "word " * 5000 + "end."
    prefix = joiner().prefix(text_document(text))
    assert prefix.held == " end." and len(prefix.ids) == 5000 * 5 - 1
    assert prefix.ids.dtype == np.int32
    assert text.endswith(prefix.behind + prefix.held)
