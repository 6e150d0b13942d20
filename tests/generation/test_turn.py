"""`--chat`: prompt and question are the turn of a user in the tokenizer's chat template."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config, DataConfig, UserError
from fam_jax.data.instructions import chat_template
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.generation.text import TextModel
from fam_jax.generation.turn import Turn
from launch import generate
from tests.data.chat_templates import NAMED, PLAIN_CHAT, TEMPLATES, unmarked, write_folder
from tests.generation.tiny import CONFIG
from tests.model.tiny import params_of, variant

ENDS = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def model_of(path: str, *, add_bos: bool = False) -> TextModel:
    vocabulary, data = load_vocabulary(path), DataConfig(vocabulary=path, add_bos=add_bos)
    config = Config(model=variant(CONFIG, vocab_size=vocabulary.vocab_size), data=data)
    return TextModel(config, params_of(config.model), vocabulary)


@pytest.mark.parametrize("style", ENDS)
def test_ids_are_those_of_the_template(
    style: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The start token stands once at the beginning, whether the template spells it or not."""
    path = write_folder(tmp_path, style, unmarked(TEMPLATES[style]))
    model, text = model_of(path, add_bos="bos_token" in NAMED[style]), "the capital\n\nof France is {}"
    vocabulary = model.vocabulary
    template = chat_template(model.config.data, vocabulary)
    assert template is not None
    wanted = [*vocabulary.encode(template.prompt([{"role": "user", "content": text}]))]
    assert (vocabulary.bos_id in wanted) == model.config.data.add_bos
    read, ids = model.streamer.read, list[int]()

    def record(tokens: Any, *rest: Any, **how: Any) -> Any:
        ids.extend(int(token) for token in tokens[0])
        return read(tokens, *rest, **how)

    monkeypatch.setattr(model.streamer, "read", record)
    turn = model.turn
    model.read(text, before=turn.before, after=turn.after)
    assert ids == wanted and not caplog.messages
    ids.clear()
    beginning = model.read(text, before=turn.before)
    model.read("?", beginning, after=turn.after)
    assert ids == [*vocabulary.encode(template.prompt([{"role": "user", "content": text + "?"}]))]
    # The answer ends where the template ends it, whatever the tokenizer calls its end.
    assert turn.end == ENDS[style]
    assert generate.stops_of(model, turn) == ([] if style != "gemma" else ["<end_of_turn>"])


def test_a_template_that_does_not_show_the_message(tmp_path: pathlib.Path) -> None:
    twice = "{% for m in messages %}{{ m.content }}, {{ m.content }}{% endfor %}"
    for number, source in enumerate(("{{ messages | length }}", twice, "{{ x.y.z }}")):
        path = write_folder(tmp_path / str(number), "qwen", source)
        with pytest.raises(UserError, match=r"^the prompt: the chat template .* do not ask by chat$"):
            _ = model_of(path).turn
    path = write_folder(tmp_path / "none", "qwen", None)
    with pytest.raises(UserError, match=r"tokenizer\.json' has no chat template beside it; put one"):
        _ = model_of(path).turn


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a run with a chat in words: no tokenizer decides about it."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jinja").write_text(PLAIN_CHAT)
    data = DataConfig(
        task="instructions",
        vocabulary="bytes",
        train_files=("x",),
        chat_template=str(folder / "chat.jinja"),
    )
    config = Config(model=variant(CONFIG, vocab_size=259), data=data)
    with Checkpoints(folder / "run", config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": params_of(config.model)}, {}, wait=True)
    return folder / "run"


def test_the_command(run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def launch(*arguments: str) -> str:
        assert generate.main([f"--checkpoint={run}", "--max-tokens=9", *arguments]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    model = TextModel.restore(run)
    assert model.turn == Turn("user: ", "\nassistant: ", "</s>")

    def expected(text: str) -> str:
        return model.generate(model.read(text), max_tokens=9).text

    (tmp_path / "book.txt").write_text("A book.\n" * 9)
    book, memory = f"--prompt-file={tmp_path}/book.txt", f"{tmp_path}/book.memory"
    asked = expected("user: " + "A book.\n" * 9 + "Who?\nassistant: ")
    assert launch("--chat", "--prompt=Who?") == expected("user: Who?\nassistant: ") != expected("Who?")
    assert launch("--chat", book, "--question=Who?") == asked
    # A saved memory is that of the turn so far.
    whole = expected("user: " + "A book.\n" * 9 + "\nassistant: ")
    assert launch("--chat", book, f"--save-memory={memory}") == whole
    assert launch("--chat", f"--load-memory={memory}", "--question=Who?") == asked
    assert launch("--chat", f"--load-memory={memory}", "--prompt=Who", "--question=?") == asked

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "Who?"}\n{"prompt": "W", "question": "ho?"}\n{"prompt_file": "none"}\n')
    for number, (given, want) in enumerate({book: asked, "": expected("user: Who?\nassistant: ")}.items()):
        with pytest.raises(UserError, match="1 of 3 lines could not be answered"):
            launch("--chat", f"--batch={source}", f"--out={out}.{number}", *filter(None, [given]))
        records = [json.loads(line) for line in pathlib.Path(f"{out}.{number}").read_text().splitlines()]
        assert [record.get("text") for record in records] == [want, want, None]
    # Results without a template do not go with those.
    with pytest.raises(UserError, match=r"was made with other settings \(chat was"):
        launch(f"--batch={source}", f"--out={out}.1")
