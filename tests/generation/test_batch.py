"""Batches: a line's text depends on the line, its place and the settings alone; every line gets a text or an error."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import Config, MeshConfig, UserError
from fam_jax.generation import batch as batch_module
from fam_jax.generation.batch import Batch, HowToComplete
from fam_jax.generation.sampling import Sampling
from fam_jax.generation.streaming import NotFiniteError
from fam_jax.generation.text import TextModel
from fam_jax.sharding import make_mesh, param_shardings
from tests.generation.tiny import CONFIG
from tests.model.tiny import params_of, variant

DRAWN = Sampling(temperature=1.0)
# Lengths from a part of a block to many blocks, with errors in between.
LINES: list[Any] = [
    {"prompt": "a"}, {"prompt": "The quick brown fox. " * 20}, {"question": "Who?"}, {"prompt": 3}, "{no json",
    {"prompt": "x" * 70, "question": "Why?"}, {"prompt_file": "missing.txt"}, {"question": "Who?"},
    {"question": "Who?"}, {"prompt": "B" * 333}, {"prompt": ""}, {"prompt": "end"},
]  # fmt: skip
FAILING = [4, 5, 7, 11]


class Visible:
    """Bytes in, a character for each id out: equal texts are equal ids."""

    vocab_size, bos_id, eos_id = 259, None, 1

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x100 + token) for token in ids)


@pytest.fixture(scope="module")
def model() -> TextModel:
    config = Config(model=variant(CONFIG, vocab_size=259))
    return TextModel(config, params_of(config.model), Visible())


def write(path: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def strict(text: str | bytes) -> Any:
    """Parse a line of strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def records(path: pathlib.Path) -> list[dict[str, Any]]:
    return [strict(line) for line in path.read_bytes().split(b"\n")[:-1]]


def complete(
    model: TextModel,
    folder: pathlib.Path,
    lines: list[Any],
    how: HowToComplete,
    name: str = "out",
    **options: Any,
) -> list[dict[str, Any]]:
    out = folder / f"{name}.jsonl"
    found = Batch(write(folder / f"{name}_in.jsonl", lines), out, {"max_tokens": how.max_tokens})
    count, failed = found.complete(model, how, **options)
    got = records(out)
    assert (count, failed) == (len(lines), sum("error" in record for record in got))
    return got


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("remembered", [False, True])
def test_a_text_does_not_depend_on_the_number_of_streams(
    model: TextModel, tmp_path: pathlib.Path, sampling: Sampling, remembered: bool
) -> None:
    state = None
    if remembered:
        model.save(tmp_path / "some.memory", model.read("Once upon a time."))
        state = model.load(tmp_path / "some.memory")
    whole = complete(model, tmp_path, LINES, HowToComplete(37, sampling, seed=5), "whole", state=state)
    longest = max((record["text"] for record in whole if "text" in record), key=len)
    how = HowToComplete(37, sampling, seed=5, stop=(longest[9], longest[20:22]))
    one, *others = (
        complete(model, tmp_path, LINES, how, str(streams), state=state, streams=streams)
        for streams in (1, 3, 8)
    )
    assert [record["line"] for record in one] == [*range(1, len(LINES) + 1)]
    assert [record["line"] for record in one if "error" in record] == FAILING
    assert all(other == one for other in others)
    assert len({record.get("tokens") for record in one}) > 2  # they end in different calls


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every call of `complete` adds its number of rows."""
    found = []

    class Counted(batch_module.Rows):
        def __init__(self, streamer: Any, count: int, **options: Any):
            found.append(count)
            super().__init__(streamer, count, **options)

    monkeypatch.setattr(batch_module, "Rows", Counted)
    return found


def test_nor_does_it_in_bfloat16(tmp_path: pathlib.Path, counts: list[int]) -> None:
    config = variant(CONFIG, vocab_size=259, dtype="bfloat16")
    narrow = TextModel(Config(model=config), params_of(config), Visible())
    how = HowToComplete(37, DRAWN, seed=5)
    one, *others = (
        complete(narrow, tmp_path, LINES, how, str(streams), streams=streams) for streams in (1, 3, 8)
    )
    assert all(other == one for other in others)
    assert counts == [8, 8, 8]  # the same program


def test_a_batch_that_continues_runs_the_program_that_it_began_with(
    model: TextModel, tmp_path: pathlib.Path, counts: list[int]
) -> None:
    source = write(tmp_path / "in.jsonl", LINES)
    out = tmp_path / "out.jsonl"
    Batch(source, out, {}).complete(model, HowToComplete(3), streams=9)
    Batch(source, out, {}).complete(model, HowToComplete(3), streams=9)  # the lines with an error
    assert counts == [9, 9]


def test_equal_lines_are_drawn_apart(model: TextModel, tmp_path: pathlib.Path) -> None:
    lines = [{"question": "Who?"}] * 5
    drawn = complete(model, tmp_path, lines, HowToComplete(20, DRAWN, seed=3), "drawn", streams=2)
    assert len({record["text"] for record in drawn}) == len(lines)
    again = complete(model, tmp_path, lines, HowToComplete(20, DRAWN, seed=3), "again", streams=2)
    other = complete(model, tmp_path, lines, HowToComplete(20, DRAWN, seed=4), "other", streams=2)
    assert drawn == again != other
    greedy = complete(model, tmp_path, lines, HowToComplete(20), "greedy", streams=2)
    assert len({record["text"] for record in greedy}) == 1


def test_no_number_of_tokens_is_too_large(model: TextModel, tmp_path: pathlib.Path) -> None:
    text = model.generate(model.read("a"), max_tokens=9).text
    how = HowToComplete(10**20, stop=(text[5],))
    (record,) = complete(model, tmp_path, [{"prompt": "a"}], how)
    assert record["text"] == text[: text.index(text[5])]
    assert model.generate(model.read("a"), max_tokens=10**20, stop=[text[5]]).text == record["text"]


def test_a_greedy_text_is_that_of_generate(model: TextModel, tmp_path: pathlib.Path) -> None:
    found = complete(model, tmp_path, LINES[:3], HowToComplete(37, stop=("\0",)), streams=2)
    for line, record in zip(LINES, found, strict=False):
        state = model.read(next(iter(line.values())))
        expected = model.generate(state, max_tokens=37, stop=("\0",))
        assert (record["text"], record["tokens"]) == (expected.text, expected.tokens)
        assert (record["ended_by"], record["tokens_read"]) == (expected.ended_by, state.tokens_read)


@pytest.mark.slow
def test_streams_spread_over_a_mesh(tmp_path: pathlib.Path) -> None:
    config = Config(model=variant(CONFIG, vocab_size=264))
    params, mesh = params_of(config.model), make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices())
    spread = jax.device_put(params, param_shardings(params, mesh))
    one, other = (
        complete(TextModel(config, values, Visible()), tmp_path, LINES[:4], HowToComplete(9), name, streams=2)
        for name, values in (("one", params), ("spread", spread))
    )
    assert one == other and sum("text" in record for record in one) == 3


def test_an_interrupted_batch_is_continued(
    model: TextModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = HowToComplete(37, DRAWN, seed=5)
    whole = complete(model, tmp_path, LINES, how, "whole", streams=3)
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    reading = batch_module._read_line

    def interrupted(model: TextModel, line: Any, *rest: Any) -> Any:
        if line == {"prompt": "B" * 333}:
            raise KeyboardInterrupt
        return reading(model, line, *rest)

    monkeypatch.setattr(batch_module, "_read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Batch(source, out, {}).complete(model, how, streams=3)
    kept = records(out)
    assert 0 < len(kept) < 10 and kept == whole[: len(kept)]
    monkeypatch.undo()
    with out.open("a") as file:
        file.write('{"line": ')  # a killed process leaves part of a line
    told: list[Any] = []
    Batch(source, out, {}).complete(model, how, streams=2, on_progress=told.append)
    assert records(out) == whole
    failed = sum("error" in record for record in kept)
    assert told[-1].done == told[-1].lines == len(LINES) - len(kept) + failed
    assert 0 < told[-1].tokens < sum(record.get("tokens", 0) for record in whole)


def test_failed_lines_are_tried_again(model: TextModel, tmp_path: pathlib.Path) -> None:
    lines = [
        {"question": "a"},
        {"prompt_file": str(tmp_path / "later.txt")},
        {"prompt": 3},
        {"question": "b"},
    ]
    before = complete(model, tmp_path, lines, HowToComplete(9), streams=2)
    assert ["error" in record for record in before] == [False, True, True, False]
    (tmp_path / "later.txt").write_text("now")
    after = complete(model, tmp_path, lines, HowToComplete(9), streams=2)
    assert [after[0], after[2], after[3]] == [before[0], before[2], before[3]]
    assert after[1]["text"] == model.generate(model.read("now"), max_tokens=9).text
    unchanged = (tmp_path / "out.jsonl").stat().st_mtime_ns
    assert complete(model, tmp_path, lines, HowToComplete(9), streams=2) == after
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == unchanged


def test_other_settings_are_refused(model: TextModel, tmp_path: pathlib.Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [{"question": "a"}]), tmp_path / "out.jsonl"
    settings = {"checkpoint": "runs/a", "temperature": 0.5, "stop": ("x",), "seed": 1}
    Batch(source, out, settings).complete(model, HowToComplete(2))
    kept = out.read_bytes()
    Batch(source, out, settings | {"checkpoint": "moved/a"})
    with pytest.raises(UserError) as caught:
        Batch(source, out, settings | {"temperature": 0.7, "stop": (), "checkpoint": "b", "more": None})
    message = str(caught.value)
    for part in (
        "temperature was 0.5, is 0.7",
        'stop was ["x"], is []',
        'checkpoint was "runs/a", is "b"',
        "another --out",
    ):
        assert part in message
    assert "seed" not in message and "more" not in message
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match=r"the settings of .*out\.jsonl are unknown; give another --out"):
        Batch(source, out, settings)
    assert out.read_bytes() == kept
    out.unlink()
    Batch(source, out, settings | {"seed": 2})  # nothing is lost by other settings any more


ODD = [
    rb'{"question": "a cut emoji \ud83d and more"}', rb'{"question": "\udc00"}', b"\xff\xfe", b"{'a': 1}", b"", b"\r",
    b"null", b"NaN", b"[1, 2]", b'"text"', b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"1" * 5000,
    b'{"question": null}', b'{"prompt": ["a"]}', b'{"prompt_file": true}', b'{"prompt_file": "a\\u0000b"}',
    b'{"prompt_file": "\\ud800"}', b'{"prompt_file": "."}', b'{"prompt_file": ""}', b'{"prompt": ""}', b"{}",
    b'{"question": NaN}', b"\xef\xbb\xbf{}",
]  # fmt: skip
CARRIED = [
    rb'{"question": "x", "id": "\udc00", "\ud800": 1}', b'{"question": "x", "id": [NaN, {"a": -Infinity}, 1e999]}',
    b'{"question": "x", "id": ' + b"9" * 4000 + b"}", '{"question": "x", "id": "\u2028 caf\u00e9"}'.encode(),
    b'{"question": "x", "id": 1, "id": 2}\r', b'{"question": "\\u0000"}',
]  # fmt: skip


def test_whatever_a_line_holds(model: TextModel, tmp_path: pathlib.Path) -> None:
    good = b'{"question": "Who?"}'
    content = b"\n".join([good, *(part for odd in (*ODD, *CARRIED) for part in (odd, good))])
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + content + b"\n")
    for _ in range(2):
        count, failed = Batch(source, out, {}).complete(model, HowToComplete(3), streams=4)
        assert (count, failed) == (2 * len(ODD + CARRIED) + 1, len(ODD))
        found = records(out)
        assert all(record["text"] == found[0]["text"] for record in found[::2])
        odd = found[1::2]
        assert all(record["error"] and "\n" not in record["error"] for record in odd[: len(ODD)])
        assert all("text" in record for record in odd[len(ODD) :])
    assert "half of a surrogate pair" in odd[0]["error"] and "not valid UTF-8 at byte 0" in odd[2]["error"]
    assert odd[0]["input"] == {"question": "a cut emoji \ud83d and more"}
    assert odd[len(ODD) + 1]["input"]["id"] == [None, {"a": None}, None]
    assert "caf\u00e9".encode() in out.read_bytes()  # readable where UTF-8 can


@pytest.mark.parametrize("streams", [1, 2])
def test_numbers_that_are_not_finite(tmp_path: pathlib.Path, streams: int) -> None:
    """Only the lines whose logits are not finite fail: after reading, or after the token that makes them so."""
    config = Config(model=variant(CONFIG, vocab_size=259, tie_embeddings=False))
    params, vocabulary = params_of(config.model), Visible()
    lines = [{"prompt": text} for text in ("first", "aZ", "second", "third")]
    texts = [vocabulary.encode(line["prompt"]) for line in lines]
    sound = TextModel(config, params, vocabulary)
    generated = [
        sound.streamer.generate(*sound.streamer.read([np.array(ids)]), max_tokens=20).tokens[0].tolist()
        for ids in texts
    ]
    # A token that the last line generates, and the others neither read nor generate.
    elsewhere = {token for ids in (*texts, *generated[:3]) for token in ids}
    place = next(n for n, token in enumerate(generated[3]) if token not in elsewhere)
    table = np.array(params["embedding"]["table"])
    table[[*vocabulary.encode("Z"), generated[3][place]]] = np.nan
    broken = TextModel(config, params | {"embedding": {"table": jnp.asarray(table)}}, vocabulary)

    expected = complete(sound, tmp_path, lines, HowToComplete(20), "sound", streams=streams)
    found = complete(broken, tmp_path, lines, HowToComplete(20), "broken", streams=streams)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert "not finite (NaN or inf) after 2 tokens" in found[1]["error"]
    assert f"not finite (NaN or inf) after {len('third') + place + 1} tokens" in found[3]["error"]
    with pytest.raises(NotFiniteError, match="after 2 tokens"):
        broken.read("aZ")
    told: list[str] = []
    with pytest.raises(NotFiniteError, match=f"after {len('third') + place + 1} tokens"):
        broken.generate(broken.read("third"), max_tokens=20, on_text=told.append)
    # The tokens before it are fine.
    assert broken.generate(broken.read("third"), max_tokens=place + 1).tokens == place + 1


def test_files_that_hold_no_lines(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match=r"in\.jsonl: is empty; give a file of JSON lines"):
        Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", {})
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link"):
        with pytest.raises(UserError, match="holds the lines to complete; give another --out"):
            Batch(source, out, {})
    assert records(source) == [{"prompt": "a"}]


def test_one_process_writes_at_a_time(model: TextModel, tmp_path: pathlib.Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    first, second, third = (Batch(source, out, {}) for _ in range(3))
    refused = []

    def interfere(_: Any) -> None:
        with pytest.raises(
            UserError, match=r"out\.jsonl: another process is writing to it; wait .* another --out"
        ):
            second.complete(model, HowToComplete(3))
        refused.append(True)

    assert first.complete(model, HowToComplete(3), on_progress=interfere) == (2, 0)
    assert refused
    # It has read the file before the first wrote to it.
    with pytest.raises(UserError, match="another process has written to it; run the same command again"):
        third.complete(model, HowToComplete(3))
    assert [record["line"] for record in records(out)] == [1, 2]
    assert Batch(source, out, {}).complete(model, HowToComplete(3)) == (2, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.settings.json"}
