"""Load a tokenizer.json with the files beside it, to the ids that AutoTokenizer of transformers 5 gives.

The tokenizer.json says how text is divided. The files beside it may name other special tokens, add tokens, and change
how a tokenizer of the class LlamaTokenizer divides text. Imports neither TensorFlow nor transformers.
"""

import dataclasses
import itertools
from typing import Any

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fam_jax.config import UserError
from fam_jax.config.strict_json import parse_json
from fam_jax.data.text_files import BOM

SETTINGS = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Files beside a tokenizer.json that it is read with.
BESIDE = (SETTINGS, SPECIAL_MAP, ADDED)
EXTRA = ("extra_special_tokens", "additional_special_tokens")
# The classes that transformers takes where tokenizer_config.json names none, by the model_type of config.json.
GEMMA, QWEN, GPT2 = "GemmaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"
LLAMA, CODE_LLAMA = "LlamaTokenizer", "CodeLlamaTokenizer"
CLASSES = {
    "gemma": GEMMA, "gemma2": GEMMA, "gemma3": GEMMA, "gemma3_text": GEMMA, "qwen2": QWEN, "qwen3": QWEN,
}  # fmt: skip
# Roles of special tokens, in the order in which transformers adds their tokens. Others come behind them.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Special tokens of a class, if no file names them.
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASS_TOKENS = {
    LLAMA: LLAMA_TOKENS,
    CODE_LLAMA: LLAMA_TOKENS,
    GEMMA: {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    QWEN: dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
# No piece of a vocabulary is this character.
UNKNOWN = "\U0010ffff"
# Stands for a blank in pieces that are not of bytes.
UNDERSCORE = "\N{LOWER ONE EIGHTH BLOCK}"
# Where Qwen's class divides a text before pieces are merged.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


@dataclasses.dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer, and the special tokens that its folder names."""

    tokenizer: tokenizers.Tokenizer
    # Spelling of special tokens by role, such as "eos_token".
    named: dict[str, str]

    @property
    def size(self) -> int:
        """Return the number of ids: one more than the highest."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def ordinary_size(self) -> int:
        """Return one more than the highest id of a piece that is not an added token."""
        added = self.tokenizer.get_added_tokens_decoder()
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        return 1 + max((id_ for id_ in ids if id_ not in added), default=-1)

    def id_of(self, role: str) -> int | None:
        """Return the id of a special token, such as "eos_token"; None: the folder names none."""
        return self.tokenizer.token_to_id(self.named[role]) if role in self.named else None

    def before_text(self) -> list[int]:
        """Return the ids of the special tokens that the tokenizer itself puts before a text."""
        encoding = self.tokenizer.encode("a")
        return [*itertools.compress(encoding.ids, itertools.takewhile(bool, encoding.special_tokens_mask))]


def load_tokenizer(path: epath.PathLike) -> FolderTokenizer:
    """Load a tokenizer.json, on any filesystem that etils supports, and the files beside it.

    Settings of lengths, which training scripts leave in a tokenizer.json, are switched off: truncation and padding are
    no part of how a text is tokenized.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a tokenizer.json, or is damaged.
      UserError: a file beside it is damaged.
    """
    file = epath.Path(path)
    text = file.read_text(encoding="utf-8").removeprefix(BOM)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing more specific.
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    settings = read_object(file.parent / SETTINGS)
    if "added_tokens_decoder" not in settings:
        settings |= read_object(file.parent / SPECIAL_MAP)
    kind = _class_name(settings, read_object(file.parent / "config.json"), tokenizer)
    as_class = isinstance(tokenizer.model, models.BPE) and _divide_as_class(tokenizer, kind, settings)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
    named = named_tokens(settings)
    added = read_object(file.parent / ADDED)
    try:
        _add_listed_tokens(tokenizer, settings, named, added)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file.parent}: the added tokens in {SETTINGS} or {ADDED} are damaged ({error}); fetch both again"
        ) from error
    of_class = {role: piece for role, piece in CLASS_TOKENS.get(kind, {}).items() if role not in settings}
    known = {role: piece for role, piece in of_class.items() if tokenizer.token_to_id(piece) is not None}
    # transformers adds tokens of the class that no file has. No model has embeddings for them, so they are not named.
    roles = named | (of_class if as_class else {})
    special = [*(roles[role] for role in sorted(roles, key=_place)), *extra_tokens(settings)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    try:
        tokenizer.encode(UNKNOWN, add_special_tokens=False)
    except Exception as error:  # such as an unknown token that is not in the vocabulary
        raise ValueError(f"{path}: cannot encode all characters ({error})") from error
    return FolderTokenizer(tokenizer, named | known)


def read_object(path: epath.Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file.

    Raises:
      UserError: the file does not hold a JSON object.
    """
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON; correct it or fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object; correct it or fetch it again")
    return found


def spelling(token: Any) -> str | None:
    """Return the text of a special token, which files give as a string or as an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer_config.json or special_tokens_map.json names, by role."""
    found = {key: spelling(value) for key, value in settings.items() if key.endswith("_token")}
    if isinstance(extra := settings.get(EXTRA[0]), dict):
        found |= {key: spelling(value) for key, value in extra.items()}
    return {key: piece for key, piece in found.items() if piece}


def extra_tokens(settings: dict[str, Any]) -> list[str]:
    """Return the special tokens without a role."""
    lists = [value for value in map(settings.get, EXTRA) if isinstance(value, list)]
    return [piece for piece in map(spelling, itertools.chain.from_iterable(lists)) if piece]


def _class_name(settings: dict[str, Any], config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> str:
    """Return the class that transformers reads a tokenizer with; empty: one that takes the file as it is."""
    declared = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix(
        "Fast"
    )
    family = config.get("model_type")
    if family == "mistral" or (declared == LLAMA and family != "qwen2" and _is_byte_level(tokenizer)):
        return ""
    if family == "qwen2" or not declared:
        return CLASSES.get(str(family), "")
    return declared


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return any(part is not None and b"ByteLevel" in part.__getstate__() for part in (
        tokenizer.pre_tokenizer, tokenizer.decoder,
    ))  # fmt: skip


def _divide_as_class(tokenizer: tokenizers.Tokenizer, kind: str, settings: dict[str, Any]) -> bool:
    """Divide text as a class of transformers does, which takes only the pieces and merges from the tokenizer.json.

    Returns:
      Whether there is such a class, and the pieces are of its kind.
    """
    if kind in (LLAMA, CODE_LLAMA):
        _divide_as_llama(tokenizer, settings, legacy=kind == LLAMA and bool(settings.get("legacy")))
        return True
    bytes_ = _is_byte_level(tokenizer)
    if bytes_ and kind in (QWEN, GPT2):
        prefix = settings.get("add_prefix_space") is True
        last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=kind == GPT2)
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        tokenizer.normalizer = normalizers.NFC() if kind == QWEN else None
        tokenizer.pre_tokenizer = last if kind == GPT2 else pre_tokenizers.Sequence([words, last])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.model.ignore_merges = False
        return True
    if kind == GEMMA and not bytes_:
        tokenizer.normalizer = normalizers.Replace(" ", UNDERSCORE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(UNDERSCORE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True
        return True
    return False


def _divide_as_llama(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], *, legacy: bool) -> None:
    """Divide text as the classes LlamaTokenizer and CodeLlamaTokenizer do, whatever the tokenizer.json says.

    They differ from the files of Llama 2 in the spaces at the beginning of a text and after special tokens.

    Args:
      tokenizer: to change.
      settings: of tokenizer_config.json.
      legacy: whether a space is put before every part between special tokens, and not before the first alone.
    """
    prefix = settings.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if legacy else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=UNDERSCORE, prepend_scheme=scheme, split=False
    )
    steps = [
        decoders.Replace(UNDERSCORE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    tokenizer.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(content=" ", left=1)] if prefix else [])]
    )
    tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True


def _place(role: str) -> int:
    """Return the place of a special token among those that transformers adds."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _add_listed_tokens(
    tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], named: dict[str, str], added: dict[str, Any]
) -> None:
    """Add the tokens that the files beside a tokenizer.json list with their ids, in the order of these."""
    special = [*named.values(), *extra_tokens(settings)]
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        tokens = [(int(id_), _added_token(fields)) for id_, fields in listed.items()]
    else:
        tokens = [
            (id_, AddedToken(piece, special=piece in special, normalized=piece not in special))
            for piece, id_ in added.items()
        ]
    tokens.sort(key=lambda pair: pair[0])
    tokenizer.add_tokens([token for _, token in tokens])


def _added_token(fields: dict[str, Any]) -> AddedToken:
    """Return a token of added_tokens_decoder; transformers marks some of them with their type."""
    return AddedToken(**{key: value for key, value in fields.items() if key != "__type"})
