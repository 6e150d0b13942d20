"""The PassKey retrieval task (section 3.2 of the paper) as a seqio Task.

Example `i` of a split is a pure function of (seed, split, i), so a stream of examples can start anywhere.
The filler is cut at token level: its length is exact under every vocabulary.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fam_jax.config import DataConfig, UserError
from fam_jax.data import passkey_text
from fam_jax.data.bos import bos_ids
from fam_jax.data.quiet_seqio import seqio, tf

SPLITS = ("train", "validation")  # of disjoint random streams, also under one seed
MAX_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Template:
    """Token ids of all that is the same in every example; each part as it continues the one before."""

    statement: Sequence[int]
    remember: Sequence[int]
    repeated: Sequence[int]
    filler: Sequence[int]  # one cycle of the five sentences
    question: Sequence[int]

    def longest_example(self, filler_tokens: int, digits: int) -> int:
        """An upper bound of an example's tokens; reached when each digit is a token, and the space before."""
        fixed = (self.statement, self.remember, self.repeated, self.question)
        return sum(map(len, fixed)) + filler_tokens + 3 * (digits + 1)


def make_template(vocabulary: seqio.Vocabulary, begin: Sequence[int] = ()) -> Template:
    """The task's sentences under `vocabulary`, behind the ids `begin`.

    Raises:
      UserError: the vocabulary has no token for some of the text, or joins words into one token.
    """
    for word in " ".join(passkey_text.example_text("0 1 2 3 4 5 6 7 8 9", 1)).split():
        if vocabulary.unk_id in vocabulary.encode(word):
            raise UserError(f"vocabulary: has no tokens for {word!r} of the PassKey text; choose another one")
    return Template(
        statement=[*begin, *vocabulary.encode(passkey_text.STATEMENT)],
        remember=_continuation(vocabulary, "0", passkey_text.REMEMBER),
        repeated=_continuation(vocabulary, "0", " " + passkey_text.REPEATED),
        filler=_continuation(vocabulary, ".", " " + passkey_text.FILLER),
        question=_continuation(vocabulary, ".", " " + passkey_text.QUESTION),
    )


def _continuation(vocabulary: seqio.Vocabulary, before: str, text: str) -> list[int]:
    """Ids of `text` where it follows `before`: without what a vocabulary adds at the start of a text."""
    head, whole = vocabulary.encode(before), vocabulary.encode(before + text)
    if whole[: len(head)] != head:
        raise UserError(f"vocabulary: joins {before!r} and {text[:9]!r} into one token; choose another one")
    return whole[len(head) :]


def random_key(*parts: Any) -> int:
    """A 63-bit key that names the random stream of `parts`; unrelated for different parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _random_pair(key: int, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw number `index` (int64 scalar) of the stream `key`: two int64 scalars, uniform below 2^62."""
    seed = tf.stack([tf.constant(key, tf.int64), index])
    # A named algorithm: the automatic choice depends on the kind of device.
    pair = tf.random.stateless_uniform([2], seed, 0, 2**62, tf.int64, alg="philox")
    return pair[0], pair[1]


class PasskeySource(seqio.FunctionDataSource):
    """Keys and filler lengths: {"key": string scalar, "filler_tokens": int64 scalar}.

    The train split is endless and the validation split holds `validation_examples`. As any order of examples
    is as random as any other, requests to shuffle and seqio's own `seed` change nothing.
    """

    def __init__(
        self,
        filler_tokens: tuple[int, int],
        seed: int,
        digits: int,
        validation_examples: int,
        filler_step: int,
    ):
        self._filler_tokens = filler_tokens
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
        """The examples that `indices`, a dataset of int64 scalars, names; nothing in between is computed."""
        stream = random_key("passkey", split, *self._stream)
        smallest = 10 ** (self._digits - 1)
        (low, high), filler_step = self._filler_tokens, self._filler_step
        lengths = (high - low) // filler_step + 1

        def draw(index: tf.Tensor) -> dict[str, tf.Tensor]:
            for_key, for_filler = _random_pair(stream, index)
            key = smallest + for_key % (9 * smallest)
            filler_tokens = low + for_filler % lengths * filler_step
            return {"key": tf.strings.as_string(key), "filler_tokens": filler_tokens}

        return indices.map(draw)


def _tokenizer(template: Template) -> Callable[..., tf.data.Dataset]:
    """The preprocessor from keys and filler lengths to token ids: {"inputs": (P,), "targets": (A,)} int32."""

    def tokenize(dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]) -> tf.data.Dataset:
        vocabulary = output_features["inputs"].vocabulary
        head = len(vocabulary.encode("is"))
        statement, remember, repeated, filler, question = (
            tf.constant(getattr(template, field.name), tf.int32) for field in dataclasses.fields(Template)
        )

        def key_ids(key: bytes) -> np.ndarray:
            return np.asarray(vocabulary.encode(f"is {key.decode()}")[head:], np.int32)

        def tokenize_example(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            # Not TensorFlow's op for it, which tells on stderr, once per dataset, of models that normalize nothing.
            key = tf.ensure_shape(tf.numpy_function(key_ids, [example["key"]], tf.int32), [None])
            # Indices into one cycle: memory does not grow with the longest filler.
            cut = tf.gather(filler, tf.range(example["filler_tokens"]) % tf.size(filler, tf.int64))
            return {
                "inputs": tf.concat([statement, key, remember, key, repeated, cut, question], axis=0),
                "targets": key,
                "targets_pretokenized": example["key"],
            }

        return dataset.map(tokenize_example)

    return tokenize


def leading_number(text: str, **_: Any) -> str:
    """The digits that `text` begins with: what counts of an answer that may run on."""
    match = re.match(r"\s*(\d*)", text)
    return match[1] if match else ""


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The fraction of predictions that equal their target."""
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
) -> seqio.Task:
    """The task: inputs is the prompt up to "The pass key is", targets the key, with no end-of-sequence id.

    Args:
      name: of the task, in seqio's letters.
      vocabulary: tokenizes prompt and answer; see `fam_jax.data.vocabulary.load_vocabulary`.
      filler_tokens: shortest and longest filler, in tokens; lengths are uniform between, ends included.
      seed: of keys and lengths. Tasks that differ in seed, digits or their fillers are independent.
      digits: of the key, 1 to 9; the first is not zero.
      validation_examples: size of the validation split. The train split is endless.
      filler_step: lengths are the shortest plus a multiple of this.
      begin: ids before every prompt; see :func:`fam_jax.data.bos.bos_ids`.

    Raises:
      UserError: an argument is out of range, or the vocabulary cannot write the task's text.
    """
    low, high = filler_tokens
    if not 0 <= low <= high:
        raise UserError(f"filler_tokens: expected 0 <= shortest <= longest, got {filler_tokens}")
    if not 1 <= digits <= MAX_DIGITS:
        raise UserError(f"digits: expected 1 to {MAX_DIGITS}, got {digits}")
    feature = seqio.Feature(vocabulary, add_eos=False)
    return seqio.Task(
        name,
        source=PasskeySource((low, high), seed, digits, validation_examples, filler_step),
        preprocessors=[_tokenizer(make_template(vocabulary, begin))],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=leading_number,
        metric_fns=[exact_match],
        shuffle_buffer_size=1,  # shuffles nothing: examples are independent already
    )


def register_passkey(name: str, *args: Any, **kwargs: Any) -> seqio.Task:
    """Makes :func:`passkey_task`, with the same arguments, known to seqio under `name`.

    Raises:
      ValueError: seqio has a task or mixture of that name.
      UserError: see :func:`passkey_task`.
    """
    task = passkey_task(name, *args, **kwargs)
    seqio.TaskRegistry.add_provider(name, task)
    return task


def passkey_examples(
    data: DataConfig, vocabulary: seqio.Vocabulary, filler_tokens: int, keys: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Examples for evaluation by generation, of a random stream that training never draws from.

    Returns:
      `keys` pairs of prompt ids (P,) and answer ids (A,), int32; the filler in the prompt is exactly
      `filler_tokens` tokens long. Lengths are the same in all pairs where each digit is a token.
    """
    fillers, begin = (filler_tokens, filler_tokens), bos_ids(vocabulary, data)
    task = passkey_task("passkey", vocabulary, fillers, seed, data.digits, begin=begin)
    examples = examples_at(task, "validation", tf.data.Dataset.range(keys))
    return [(example["inputs"], example["targets"]) for example in examples.as_numpy_iterator()]


def examples_at(task: seqio.Task, split: str, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Preprocessed examples of a PassKey task at `indices` (int64 scalars), computing no others."""
    return task.preprocess_postcache(task.source.at(split, indices), sequence_length=None)
