"""PassKey retrieval (section 3.2 of the paper) as a seqio task.

Example i of a split is a pure function of (seed, split, i), so reading can start at any example. The filler is cut at
token level, so it has the same length under every vocabulary.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fam_jax.config import DataConfig, UserError
from fam_jax.data import passkey_text
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key
from fam_jax.data.vocabulary import bos_ids

# Independent of each other, under the same seed too.
SPLITS = ("train", "validation")
MAX_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Template:
    """Token ids of the fixed parts of every example, each tokenized as a continuation of the part before."""

    statement: Sequence[int]
    remember: Sequence[int]
    repeated: Sequence[int]
    # One cycle of the five sentences.
    filler: Sequence[int]
    question: Sequence[int]
    # For keys that stand within the filler: its first cycle at the start of a text, and the statement after it.
    opening: Sequence[int]
    late_statement: Sequence[int]

    def longest_example(self, filler_tokens: int, digits: int, *, late: bool = False) -> int:
        """Return an upper bound on the tokens of an example; exact if the space and each digit are one token.

        Args:
          filler_tokens: length of the filler.
          digits: of the key.
          late: whether the key may stand within the filler.
        """
        statement = max(len(self.statement), len(self.late_statement) if late else 0)
        fixed = sum(map(len, (self.remember, self.repeated, self.question)))
        return statement + fixed + filler_tokens + 3 * (digits + 1)


def make_template(vocabulary: seqio.Vocabulary, begin: Sequence[int] = ()) -> Template:
    """Tokenize the fixed parts of the task, with the ids `begin` before the first.

    Raises:
      UserError: the vocabulary cannot express some of the text, or joins two parts into one token.
    """
    for word in " ".join(passkey_text.example_text("0 1 2 3 4 5 6 7 8 9", 1)).split():
        if vocabulary.unk_id in vocabulary.encode(word):
            raise UserError(
                f"vocabulary: has no tokens for {word!r} of the PassKey text; use another vocabulary"
            )
    return Template(
        statement=[*begin, *vocabulary.encode(passkey_text.STATEMENT)],
        remember=_continuation(vocabulary, "0", passkey_text.REMEMBER),
        repeated=_continuation(vocabulary, "0", " " + passkey_text.REPEATED),
        filler=_continuation(vocabulary, ".", " " + passkey_text.FILLER),
        question=_continuation(vocabulary, ".", " " + passkey_text.QUESTION),
        opening=[*begin, *vocabulary.encode(passkey_text.FILLER)],
        late_statement=_continuation(vocabulary, ".", " " + passkey_text.STATEMENT),
    )


def _continuation(vocabulary: seqio.Vocabulary, before: str, text: str) -> list[int]:
    """Tokenize `text` as the continuation of `before`, without what a vocabulary adds at the start of a text."""
    head, whole = vocabulary.encode(before), vocabulary.encode(before + text)
    if whole[: len(head)] != head:
        raise UserError(
            f"vocabulary: joins {before!r} and {text[:9]!r} into one token; use another vocabulary"
        )
    return whole[len(head) :]


def key_ids(vocabulary: seqio.Vocabulary, key: str) -> list[int]:
    """Return the tokens of a key as the continuation of "is"."""
    return vocabulary.encode(f"is {key}")[len(vocabulary.encode("is")) :]


def key_of(draw: Any, digits: int) -> Any:
    """Return a number of so many digits, the first of which is not 0, for a uniform draw: an int or a tensor."""
    smallest = 10 ** (digits - 1)
    return smallest + draw % (9 * smallest)


def _random_pair(key: int, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return draw number `index` (int64 scalar) of a key: two int64 scalars, uniform below 2^62."""
    seed = tf.stack([tf.constant(key, tf.int64), index])
    # Named, as the automatic choice depends on the type of device.
    pair = tf.random.stateless_uniform([2], seed, 0, 2**62, tf.int64, alg="philox")
    return pair[0], pair[1]


class PasskeySource(seqio.FunctionDataSource):
    """Source of {"key": string scalar, "filler_tokens": int64 scalar, "before_tokens": int64 scalar}.

    `filler_tokens` stand between key and question, `before_tokens` of filler in front of the key.

    The train split is endless; the validation split has `validation_examples`. Examples are independent, so a request
    to shuffle and seqio's own `seed` have no effect.
    """

    def __init__(
        self,
        filler_tokens: tuple[int, int],
        seed: int,
        digits: int,
        validation_examples: int,
        filler_step: int,
        before_tokens: int = 0,
        late: tuple[float, int] = (0.0, 1),
    ):
        self._filler_tokens = filler_tokens
        self._before_tokens = before_tokens
        self._late = late
        self._filler_step = filler_step
        self._digits = digits
        self._stream = (seed, *filler_tokens, digits, filler_step)
        sizes = {"train": None, "validation": validation_examples}

        def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            del shuffle_files, seed
            size = sizes[split]
            return self.at(split, tf.data.Dataset.range(tf.int64.max if size is None else size))

        super().__init__(dataset_fn, SPLITS, num_input_examples=sizes, caching_permitted=False)

    def at(self, split: str, indices: tf.data.Dataset) -> tf.data.Dataset:
        """Return the examples at `indices`, a dataset of int64 scalars, without computing any others."""
        stream = random_key("passkey", split, *self._stream)
        late = random_key("passkey", "late", split, *self._stream)
        (low, high), filler_step = self._filler_tokens, self._filler_step
        fraction, step = self._late
        lengths = (high - low) // filler_step + 1

        def draw(index: tf.Tensor) -> dict[str, tf.Tensor]:
            for_key, for_filler = _random_pair(stream, index)
            key = key_of(for_key, self._digits)
            filler_tokens = low + for_filler % lengths * filler_step
            before_tokens = tf.constant(self._before_tokens, tf.int64)
            if fraction:
                for_place, for_whether = _random_pair(late, index)
                place = for_place % (filler_tokens // step + 1) * step
                before_tokens = tf.where(for_whether < round(fraction * 2**62), place, before_tokens)
                filler_tokens -= before_tokens
            return {
                "key": tf.strings.as_string(key),
                "filler_tokens": filler_tokens,
                "before_tokens": before_tokens,
            }

        return indices.map(draw)


def _tokenizer(template: Template) -> Callable[..., tf.data.Dataset]:
    """Return the preprocessor that makes token ids, {"inputs": (P,), "targets": (A,)} int32, of a source's examples."""

    def tokenize(dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]) -> tf.data.Dataset:
        vocabulary = output_features["inputs"].vocabulary
        statement, remember, repeated, filler, question, opening, late_statement = (
            tf.constant(getattr(template, field.name), tf.int32) for field in dataclasses.fields(Template)
        )

        def cycles(tokens: tf.Tensor) -> tf.Tensor:
            # Indices into one cycle, so that memory does not grow with the longest filler.
            return tf.gather(filler, tf.range(tokens) % tf.size(filler, tf.int64))

        def ids_of(key: bytes) -> np.ndarray:
            return np.asarray(key_ids(vocabulary, key.decode()), np.int32)

        def tokenize_example(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            # TensorFlow's own op would warn on stderr, once per dataset, about models without normalization.
            key = tf.ensure_shape(tf.numpy_function(ids_of, [example["key"]], tf.int32), [None])
            before = example["before_tokens"]
            rest = tf.maximum(before - tf.size(opening, tf.int64), 0)
            beginning = tf.cond(
                before > 0,
                lambda: tf.concat([opening[:before], cycles(rest), late_statement], axis=0),
                lambda: statement,
            )
            cut = cycles(example["filler_tokens"])
            return {
                "inputs": tf.concat([beginning, key, remember, key, repeated, cut, question], axis=0),
                "targets": key,
                "targets_pretokenized": example["key"],
            }

        return dataset.map(tokenize_example)

    return tokenize


def leading_number(text: str, **_: Any) -> str:
    """Return the digits at the start of `text`; the rest of an answer does not count."""
    match = re.match(r"\s*(\d*)", text)
    return match[1] if match else ""


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return the fraction of predictions that equal their target, by name for seqio."""
    equal = [target == prediction for target, prediction in zip(targets, predictions, strict=True)]
    return {"exact_match": float(np.mean(equal))}


def passkey_task(
    name: str,
    vocabulary: seqio.Vocabulary,
    filler_tokens: tuple[int, int],
    seed: int,
    digits: int = 5,
    validation_examples: int = 1000,
    filler_step: int = 1,
    begin: Sequence[int] = (),
    before_tokens: int = 0,
    late: tuple[float, int] = (0.0, 1),
) -> seqio.Task:
    """Return the task. Inputs are the prompt up to "The pass key is", targets the key without end-of-sequence id.

    Args:
      name: of the task; seqio allows letters, digits and underscores.
      vocabulary: of :func:`fam_jax.data.vocabulary.load_vocabulary`.
      filler_tokens: shortest and longest filler, in tokens; lengths are uniform in between, both included.
      seed: of keys and lengths. Tasks that differ in seed, digits or fillers are independent.
      digits: of the key, 1 to 9; the first is never 0.
      validation_examples: size of the validation split. The train split is endless.
      filler_step: lengths are the shortest one plus a multiple of this.
      begin: ids before every prompt; see :func:`fam_jax.data.vocabulary.bos_ids`.
      before_tokens: filler in front of the key, beside `filler_tokens`.
      late: fraction of examples whose key stands within its filler, and a number of tokens: the key stands behind a
        multiple of it, and all multiples are equally likely.

    Raises:
      UserError: an argument is out of range, or the vocabulary cannot express the task's text.
    """
    low, high = filler_tokens
    if not 0 <= low <= high:
        raise UserError(f"filler_tokens: must satisfy 0 <= shortest <= longest, got {filler_tokens}")
    if not 1 <= digits <= MAX_DIGITS:
        raise UserError(f"digits: must be between 1 and {MAX_DIGITS}, got {digits}")
    feature = seqio.Feature(vocabulary, add_eos=False)
    return seqio.Task(
        name,
        source=PasskeySource(
            (low, high), seed, digits, validation_examples, filler_step, before_tokens, late
        ),
        preprocessors=[_tokenizer(make_template(vocabulary, begin))],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=leading_number,
        metric_fns=[exact_match],
        # A buffer of one does not shuffle. Examples are independent already.
        shuffle_buffer_size=1,
    )


def register_passkey(name: str, *args: Any, **kwargs: Any) -> seqio.Task:
    """Register a :func:`passkey_task` with seqio and return it; the arguments are the same.

    Raises:
      ValueError: seqio already has a task or mixture of that name.
      UserError: see :func:`passkey_task`.
    """
    task = passkey_task(name, *args, **kwargs)
    seqio.TaskRegistry.add_provider(name, task)
    return task


def passkey_examples(
    data: DataConfig,
    vocabulary: seqio.Vocabulary,
    filler_tokens: int,
    keys: int,
    seed: int,
    before_tokens: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return examples for evaluation by generation, from a random stream that training never draws from.

    Args:
      data: digits of the key; whether prompts begin with the start token.
      vocabulary: of prompt and answer.
      filler_tokens: exact length of the filler between key and question in each prompt.
      keys: number of examples.
      seed: of the keys.
      before_tokens: exact length of the filler in front of the key.

    Returns:
      Pairs of prompt ids (P,) and answer ids (A,), int32. All pairs have the same lengths if each digit is one token.
    """
    fillers, begin = (filler_tokens, filler_tokens), bos_ids(vocabulary, data)
    task = passkey_task(
        "passkey", vocabulary, fillers, seed, data.digits, begin=begin, before_tokens=before_tokens
    )
    examples = examples_at(task, "validation", tf.data.Dataset.range(keys))
    return [(example["inputs"], example["targets"]) for example in examples.as_numpy_iterator()]


def examples_at(task: seqio.Task, split: str, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Return the preprocessed examples of a PassKey task at `indices` (int64 scalars), without computing any others."""
    return task.preprocess_postcache(task.source.at(split, indices), sequence_length=None)
