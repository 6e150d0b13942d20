"""Register seqio tasks to train on. Tests name this module in `data.imports`."""

import functools
import os

import numpy as np

from fam_jax.data import bookmarks
from fam_jax.data.quiet_seqio import seqio, tf

SIZE, MANY = 12, 240
# Processes that a test starts import this module.
bookmarks.SECONDS = float(os.environ.get("FAM_TEST_BOOKMARK_SECONDS", bookmarks.SECONDS))


def examples(split: str, shuffle_files: bool, seed: int | None = None, count: int = SIZE) -> tf.data.Dataset:
    del shuffle_files, seed
    first = {"train": 0, "validation": 100}[split]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [f"question {first + i}?" for i in range(count)],
            "targets": [f"answer {'x' * (i % SIZE)}" for i in range(count)],
        }
    )


@seqio.map_over_dataset(num_seeds=1)
def noise(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Append a random digit to the answer."""
    digit = tf.random.stateless_uniform([], seed, 0, 10, tf.int32)
    return {**example, "targets": example["targets"] + tf.strings.as_string(digit)}


BYTES = seqio.ByteVocabulary()
SOURCE = seqio.FunctionDataSource(examples, splits=("train", "validation"))
BOTH = {
    "inputs": seqio.Feature(BYTES, add_eos=False),
    "targets": seqio.Feature(BYTES, add_eos=True),
}


def register(name: str, features: dict[str, seqio.Feature], *steps: object, count: int = SIZE) -> None:
    source = seqio.FunctionDataSource(
        functools.partial(examples, count=count), splits=("train", "validation")
    )
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*steps, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
    )


register("fam_test_questions", BOTH)
register("fam_test_noise", BOTH, noise)
# A test that reads them makes few of the datasets that seqio makes in each epoch.
register("fam_test_many", BOTH, count=MANY)
register("fam_test_many_noise", BOTH, noise, count=MANY)
register("fam_test_answers", {"targets": BOTH["targets"]})
seqio.TaskRegistry.add(
    "fam_test_cached",  # seqio keeps small datasets whose size it knows in memory
    source=seqio.FunctionDataSource(
        examples, splits=("train", "validation"), num_input_examples={"train": SIZE, "validation": SIZE}
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features=BOTH,
)
seqio.MixtureRegistry.add("fam_test_cached_mixture", [("fam_test_cached", 1.0)])
register("fam_test_no_targets", {"inputs": BOTH["inputs"]})
seqio.TaskRegistry.add(
    "fam_test_passkey_ids",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": [[3, 4]]}),
        splits=("train",),
    ),
    preprocessors=[],
    output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(9))},
)
seqio.TaskRegistry.add(
    "fam_test_floats",
    source=SOURCE,
    preprocessors=[],
    output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(3), dtype=tf.float32)},
)
seqio.MixtureRegistry.add("fam_test_many_mixture", [("fam_test_many", 1.0), ("fam_test_many_noise", 3.0)])
seqio.MixtureRegistry.add("fam_test_mixture", [("fam_test_questions", 1.0), ("fam_test_noise", 3.0)])


def expected(index: int, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Return ids and weights of an example of fam_test_questions."""
    first = {"train": 0, "validation": 100}[split]
    question, answer = BYTES.encode(f"question {first + index}?"), BYTES.encode(f"answer {'x' * index}")
    weights = [0.0] * len(question) + [1.0] * (len(answer) + 1)
    return np.array([*question, *answer, BYTES.eos_id], np.int32), np.array(weights, np.float32)
