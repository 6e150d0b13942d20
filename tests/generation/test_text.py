"""Text models: a file is read as its ids are, states branch, stops end a text exactly."""

import dataclasses
import io
import pathlib

import jax
import numpy as np
import pytest

from fam_jax.checkpoint import CheckpointError, Checkpoints
from fam_jax.config import Config, ConfigError, DataConfig, UserError
from fam_jax.data.build import task_vocabulary
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.vocabulary import load_vocabulary, task_digest
from fam_jax.evaluation import evaluate
from fam_jax.generation.sampling import Sampling
from fam_jax.generation.state_file import StateFileError, save_state
from fam_jax.generation.text import TextModel, TextState
from fam_jax.model.memory_health import MemoryHealth
from tests.generation.tiny import CONFIG
from tests.model.tiny import params_of, variant

TEXT = "".join(chr(65 + i * i % 26) for i in range(101))
DRAWN = Sampling(temperature=1.0)


def model_of(vocab_size: int = 259, **changes: int) -> TextModel:
    config = Config(model=variant(CONFIG, vocab_size=vocab_size, **changes))
    return TextModel(config, params_of(config.model), load_vocabulary("bytes"))


@pytest.fixture(scope="module")
def model() -> TextModel:
    return model_of()


@pytest.fixture(scope="module")
def state(model: TextModel) -> TextState:
    return model.read(io.BytesIO(TEXT.encode()), chunk_blocks=3)


def assert_same(one: TextState, other: TextState) -> None:
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one.streams.position.filled, other.streams.position.filled)
    np.testing.assert_allclose(one.streams.layers.fam, other.streams.layers.fam, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_as_its_ids_are(model: TextModel, state: TextState) -> None:
    ids = np.asarray(model.vocabulary.encode(TEXT))
    logits, memory = model.streamer.read([ids])
    assert_same(state, TextState(memory, logits))
    assert state.tokens_read == len(TEXT)


@pytest.mark.parametrize("cut", [1, 50, 100])
def test_any_division_of_a_text_is_the_same(model: TextModel, state: TextState, cut: int) -> None:
    told: list[int] = []
    first = model.read(TEXT[:cut], chunk_blocks=3, on_progress=told.append)
    assert told[-1] == cut
    assert_same(model.read(TEXT[cut:], first), state)
    assert_same(model.read(TEXT[cut:], first), state)  # a state may be continued again


def test_a_memory_file_continues_the_text(model: TextModel, state: TextState, tmp_path: pathlib.Path) -> None:
    first = model.read(TEXT[:50])
    model.save(tmp_path / "some.memory", first)
    loaded = model.load(tmp_path / "some.memory")
    assert loaded.tokens_read == 50
    assert_same(model.read(TEXT[50:], loaded), state)
    with pytest.raises(UserError, match="does not say what comes next"):
        model.generate(loaded, max_tokens=1)
    with pytest.raises(StateFileError, match="another model"):
        model_of(segments=2).load(tmp_path / "some.memory")


def test_a_memory_of_several_streams_is_refused(
    model: TextModel, state: TextState, tmp_path: pathlib.Path
) -> None:
    both = state.streams.select([0, 0])
    save_state(tmp_path / "two.memory", both, model.config.model, model.streamer.params)
    with pytest.raises(UserError, match="holds 2 streams"):
        model.load(tmp_path / "two.memory")


def test_generation_is_what_the_streamer_generates(model: TextModel, state: TextState) -> None:
    told: list[str] = []
    found = model.generate(state, max_tokens=40, on_text=told.append)
    expected = model.streamer.generate(state.logits, state.streams, max_tokens=40, stop_tokens=[1])
    ids = expected.tokens[0, : expected.lengths[0]].tolist()
    ended = bool(expected.stopped[0])
    assert found.text == model.vocabulary.decode(ids[: len(ids) - ended]) == "".join(told)
    assert (found.tokens, found.ended_by) == (len(ids), "end" if ended else "length")
    assert found.state.tokens_read == len(TEXT) + len(ids)


def test_sampling_depends_on_the_seed_alone(model: TextModel, state: TextState) -> None:
    first, again, other = (
        model.generate(state, max_tokens=40, sampling=DRAWN, seed=seed).text for seed in (1, 1, 2)
    )
    assert first == again != other


def longest(model: TextModel, state: TextState) -> tuple[str, int]:
    """Return the longest of a few sampled texts, and its seed."""
    drawn = [
        (model.generate(state, max_tokens=60, sampling=DRAWN, seed=seed).text, seed) for seed in range(4)
    ]
    return max(drawn, key=lambda one: len(one[0]))


def test_a_stop_ends_the_text_and_leaves_nothing_behind(model: TextModel, state: TextState) -> None:
    """None of it is passed on, and the state is that after its last token."""
    text, seed = longest(model, state)
    assert len(text) > 20
    stop, told = text[15:18], []
    found = model.generate(
        state, max_tokens=60, sampling=DRAWN, seed=seed, stop=["not there", stop], on_text=told.append
    )
    assert found.text == text[: text.index(stop)] == "".join(told)
    assert found.ended_by == stop
    assert found.state.tokens_read == state.tokens_read + found.tokens
    on = model.generate(found.state, max_tokens=1)
    assert on.tokens == 1


def test_the_start_of_a_stop_is_passed_on_at_the_end(model: TextModel, state: TextState) -> None:
    text, seed = longest(model, state)
    told: list[str] = []
    stops = [text[-1] + "\0never"]
    found = model.generate(state, max_tokens=60, sampling=DRAWN, seed=seed, stop=stops, on_text=told.append)
    assert found.text == text == "".join(told)


def test_a_start_token_that_is_typed_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Vocabulary:
        vocab_size, bos_id, eos_id = 259, 3 + ord("^"), None
        encode, decode = load_vocabulary("bytes").encode, load_vocabulary("bytes").decode

    config = Config(model=variant(CONFIG, vocab_size=259), data=DataConfig(add_bos=True))
    model = TextModel(config, params_of(config.model), Vocabulary())
    with caplog.at_level("WARNING", "absl"):
        state = model.read("a^b")
        model.read("^b", state)  # no new stream
        assert not caplog.messages
        assert model.read("^b").tokens_read == 3
        model.read("^c")
    assert len(caplog.messages) == 1 and "begins with the start token" in caplog.messages[0]


def test_a_seqio_run_uses_the_vocabulary_of_its_task(tmp_path: pathlib.Path) -> None:
    data = DataConfig(
        task="seqio:fam_test_questions", imports=("tests.data.text_seqio_tasks",), sequence_length=32
    )
    config = Config(model=variant(CONFIG, vocab_size=259), data=data)
    with Checkpoints(tmp_path / "run", config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": params_of(config.model)}, {}, wait=True)
    model = TextModel.restore(tmp_path / "run", imports=data.imports)
    assert (model.vocabulary, model.step) == (task_vocabulary(data), 1)
    own = TextModel(config, params_of(config.model), load_vocabulary("bytes"))
    text = "What is 3 plus 4?"
    state = model.read(text)
    assert state.tokens_read == len(text)
    assert model.generate(state, max_tokens=9).text == own.generate(own.read(text), max_tokens=9).text


def test_a_seqio_run_knows_the_vocabulary_of_its_task(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(
        task="seqio:fam_test_questions", imports=("tests.data.text_seqio_tasks",), sequence_length=32
    )
    config = Config(model=variant(CONFIG, vocab_size=300), data=data)
    digest = task_digest(task_vocabulary(data), data)
    with Checkpoints(
        tmp_path / "run", config=dataclasses.asdict(config), keep=1, task_vocabulary=digest
    ) as checkpoints:
        checkpoints.save(1, {"params": params_of(config.model)}, {}, wait=True)
    model = TextModel.restore(tmp_path / "run")
    model.save(tmp_path / "memory", model.read("a"))
    assert model.load(tmp_path / "memory").tokens_read == 1
    for other in (load_vocabulary("passkey"), seqio.ByteVocabulary(extra_ids=3)):
        assert task_digest(other, data) not in (digest, "") and task_digest(other, DataConfig()) == ""
        with pytest.raises(StateFileError, match="with another vocabulary"):
            TextModel(config, params_of(config.model), other).load(tmp_path / "memory")
        monkeypatch.setattr("fam_jax.data.build.task_vocabulary", lambda data, other=other: other)
        for use in (TextModel.restore, evaluate):
            with pytest.raises(CheckpointError, match="another vocabulary than the data task has now"):
                use(tmp_path / "run")


def test_mistakes(model: TextModel, state: TextState) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: 200 is smaller than the vocabulary .* 259 pieces"):
        model_of(vocab_size=200)
    with pytest.raises(UserError, match="holds no tokens"):
        model.read("")
    with pytest.raises(UserError, match="is empty"):
        model.read(io.BytesIO(b""))
    with pytest.raises(UserError, match="max_tokens: must be at least 1, got 0"):
        model.generate(state, max_tokens=0)
    with pytest.raises(UserError, match="stop: must not be an empty string"):
        model.generate(state, max_tokens=1, stop=[""])
    with pytest.raises(UserError, match="seed: must be from 0 to 4294967295"):
        model.generate(state, max_tokens=1, seed=1 << 32)
    with pytest.raises(
        UserError, match=r"the text: is not valid Unicode at character 2 \(U\+D83D, half of a"
    ):
        model.read("a \ud83d")


def test_a_long_reading_looks_at_the_memory(
    model: TextModel, state: TextState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It changes nothing in the state, and warns of a memory that no longer changes."""
    seen: list[MemoryHealth] = []
    model.read(TEXT, chunk_blocks=3, on_health=seen.append)
    assert not seen, "the text is short"
    monkeypatch.setattr("fam_jax.generation.text.LOOK_BLOCKS", 8)
    again = model.read(io.BytesIO(TEXT.encode()), chunk_blocks=3, on_health=seen.append)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
    (found,) = seen
    assert found.means().keys() == {"memory_rms", "memory_unchanged"}
    assert found.means()["memory_unchanged"] < 0.1 and not caplog.records
    large = dataclasses.replace(state.streams.layers, fam=state.streams.layers.fam * 1e12)
    model.read(TEXT, TextState(dataclasses.replace(state.streams, layers=large), None), on_health=seen.append)
    assert seen[-1].means()["memory_unchanged"] == 1
    assert "ALARM: the memory of layer 0 is frozen" in caplog.text
