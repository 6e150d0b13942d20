"""Folders with tokenizers of many kinds, as they are found beside models."""

import functools
import io
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "the capital of France is Paris and a book about rivers that run to sea by night".split()  # noqa: SIM905
BYTE_TOKENS = ("<|begin|>", "<|end|>", "<|eot|>")
Make = Callable[[pathlib.Path], None]


def corpus() -> list[str]:
    draws = random.Random(0)
    return [" ".join(draws.choices(WORDS, k=draws.randint(5, 20))) + "." for _ in range(300)]


def byte_level(
    template: str = "<|begin|> $A", specials: tuple[str, ...] = BYTE_TOKENS
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE, as of Llama 3; the template says what it puts around a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    if template:
        named = [(piece, made.token_to_id(piece)) for piece in specials if piece in template]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return made


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """Return a serialized SentencePiece model, as of Llama 2."""
    out = io.BytesIO()
    how = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1,
        "hard_vocab_limit": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, minloglevel=2, num_threads=1, **how | options
    )
    return out.getvalue()


def llama2() -> tokenizers.Tokenizer:
    """Return what a tokenizer.json of Llama 2 holds: a BPE over pieces with U+2581 for spaces, and bytes."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocabulary = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    pairs = {
        piece: [
            (piece[:i], piece[i:])
            for i in range(1, len(piece))
            if {piece[:i], piece[i:]} <= vocabulary.keys()
        ]
        for piece in vocabulary
        if not (model.is_control(vocabulary[piece]) or piece.startswith("<"))
    }
    merges = [pair for piece in pairs for pair in pairs[piece]]
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    made.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def entry(content: str, special: bool = True) -> dict[str, Any]:
    """Return a token of added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": special, **flags}


def write(folder: pathlib.Path, *, model_type: str = "llama", **files: Any) -> None:
    """Write a folder: `tokenizer` as tokenizer.json, bytes as they are, and other values as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        if name == "tokenizer":
            content.save(str(folder / "tokenizer.json"))
        elif isinstance(content, bytes):
            (folder / "tokenizer.model").write_bytes(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))


NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CHATML = {"<|im_end|>": 400, "<|im_start|>": 401}
OF_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def with_lengths() -> tokenizers.Tokenizer:
    made = byte_level()
    made.enable_truncation(max_length=4)
    made.enable_padding(length=64, pad_id=0, pad_token=made.id_to_token(0), direction="left")
    return made


def llama2_with_chatml() -> tokenizers.Tokenizer:
    made = llama2()
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in CHATML])
    return made


def _folder(**files: Any) -> Make:
    return lambda folder: write(
        folder, **{name: made() if callable(made) else made for name, made in files.items()}
    )


# What a folder holds, by its kind. All of them are read by AutoTokenizer, and here to the same ids.
KINDS: dict[str, Make] = {
    "alone": _folder(tokenizer=byte_level),
    "named": _folder(tokenizer=byte_level, tokenizer_config=NAMED | FAST),
    "lengths": _folder(tokenizer=with_lengths, tokenizer_config=NAMED),
    "no template": _folder(
        tokenizer=lambda: byte_level(""), tokenizer_config=NAMED | {"add_bos_token": True}
    ),
    "template against settings": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | {"add_bos_token": False}
    ),
    "special tokens map": _folder(tokenizer=byte_level, special_tokens_map={"eos_token": entry("<|eot|>")}),
    "map over settings": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED, special_tokens_map={"eos_token": "<|eot|>"}
    ),
    "map beside a decoder": _folder(
        tokenizer=byte_level,
        tokenizer_config=NAMED | {"added_tokens_decoder": {"360": entry("<|begin|>")}},
        special_tokens_map={"eos_token": "<|eot|>"},
    ),
    "tokens of the settings": _folder(
        tokenizer=byte_level,
        tokenizer_config=NAMED
        | {
            "eos_token": "<|new|>",
            "added_tokens_decoder": {"364": entry("word", False), "363": entry("<|new|>")},
        },
    ),
    "added_tokens.json": _folder(
        tokenizer=byte_level,
        tokenizer_config=NAMED | {"eos_token": "<|b|>"},
        added_tokens={"<|b|>": 364, "<|a|>": 363},
    ),
    "extra tokens": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | {"additional_special_tokens": ["<|eot|>", "<|x|>"]}
    ),
    "tokens by role": _folder(
        tokenizer=byte_level,
        tokenizer_config=NAMED | {"image_token": "<|i|>", "extra_special_tokens": {"a_token": "<|a|>"}},
    ),
    "an end that no file has": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | {"eos_token": "<|end_of_turn|>"}
    ),
    "an end that is a word": _folder(tokenizer=byte_level, tokenizer_config=NAMED | {"eos_token": "Ġthe"}),
    "no end": _folder(tokenizer=byte_level, tokenizer_config={"bos_token": "<|begin|>", "eos_token": None}),
    "special tokens as text": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | FAST | {"split_special_tokens": True}
    ),
    "bytes as Llama": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | {"tokenizer_class": "LlamaTokenizerFast"}
    ),
    "Qwen": _folder(
        model_type="qwen3", tokenizer=lambda: byte_level("", ("<|endoftext|>",)), tokenizer_config=FAST
    ),
    # Classes that divide a text in their own way, whatever the file says.
    "Qwen's class": _folder(model_type="qwen2", tokenizer=lambda: byte_level("", ("<|endoftext|>",))),
    "Qwen's class with prefix": _folder(
        model_type="qwen3",
        tokenizer=lambda: byte_level("", ("<|endoftext|>",)),
        tokenizer_config={"tokenizer_class": "Qwen2TokenizerFast", "add_prefix_space": True},
    ),
    "Qwen's class adds a token": _folder(
        model_type="qwen2", tokenizer=byte_level, tokenizer_config=NAMED | {"pad_token": "<|pad|>"}
    ),
    "the class of GPT-2": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED | {"tokenizer_class": "GPT2Tokenizer"}
    ),
    "Gemma's class": _folder(
        model_type="gemma2",
        tokenizer=llama2,
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "Llama 2": _folder(tokenizer=llama2, tokenizer_config=OF_LLAMA),
    "Llama 2, legacy": _folder(tokenizer=llama2, tokenizer_config=OF_LLAMA | {"legacy": True}),
    "Llama 2 without prefix": _folder(
        tokenizer=llama2, tokenizer_config=OF_LLAMA | {"add_prefix_space": False}
    ),
    "Llama 2 by class alone": _folder(
        tokenizer=llama2, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"}
    ),
    "Code Llama": _folder(
        tokenizer=llama2,
        tokenizer_config=OF_LLAMA
        | {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}
        | dict.fromkeys(("prefix_token", "middle_token", "suffix_token", "eot_token", "fill_token")),
    ),
    "Llama 2 without settings": _folder(tokenizer=llama2),
    "Mistral": _folder(model_type="mistral", tokenizer=llama2, tokenizer_config=OF_LLAMA | {"legacy": True}),
    "Gemma": _folder(model_type="gemma2", tokenizer=llama2, tokenizer_config=OF_LLAMA | FAST),
    "ChatML": _folder(
        tokenizer=llama2_with_chatml,
        model=sentencepiece_model,
        added_tokens=CHATML,
        tokenizer_config=OF_LLAMA
        | {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                str(id_): entry(piece) for piece, id_ in {"<unk>": 0, "<s>": 1, "</s>": 2, **CHATML}.items()
            },
        },
    ),
    "a tiktoken model beside": _folder(
        tokenizer=byte_level, tokenizer_config=NAMED, model=b"IQ== 0\nIg== 1\n"
    ),
    "another model beside": _folder(tokenizer=llama2, tokenizer_config=OF_LLAMA, model=sentencepiece_model),
}
