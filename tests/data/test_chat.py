"""Chat templates: the ids of transformers, and weight 1 on the assistant's turns and their end tokens alone."""

import pathlib
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import ConfigError, DataConfig
from fam_jax.data import chat
from fam_jax.data.chat import ChatTemplate, Message, Rendered
from fam_jax.data.instructions import chat_template
from fam_jax.data.records import RowError
from fam_jax.data.token_weights import TokenWeights
from fam_jax.data.vocabulary import load_vocabulary
from tests.data.chat_templates import (
    ALWAYS,
    LLAMA3,
    NAMED,
    PLAIN,
    QWEN,
    TEMPLATES,
    THINKING,
    marked,
    unmarked,
    write_folder,
)
from tests.hf.real_tokenizers import fetch_tokenizer


def turns(*contents: str, first: str = "user") -> list[Message]:
    """Return messages of user and assistant in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


SYSTEM = {"role": "system", "content": "the book is about rivers"}
CHATS = {
    "one turn": turns("the capital?", "Paris"),
    "several turns": turns("a", "b", "the sea", "runs by night\n\n", "c", ""),
    "ends with the user": turns("the capital?", "Paris", "and of the sea?"),
    "unicode": turns("Grün 😀 漢字?", "e\u0301 漢字 😀"),
    "blanks": turns("  the  ", "  a book  "),
}
# Where the template takes them.
MORE = {
    "system": [SYSTEM, *turns("the capital?", "Paris")],
    "assistant first": turns("Paris", "the capital?", "of France", first="assistant"),
    "two turns of the assistant": [*turns("a", "b"), *turns("c", first="assistant")],
    "tools": [
        *turns("the weather?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "w", "arguments": {"a": "é"}}}],
        },
        {"role": "tool", "content": "rain"},
        *turns("It rains.", first="assistant"),
    ],
}
TAKES = {
    "qwen": (*CHATS, *MORE),
    "llama3": (*CHATS, "system", "two turns of the assistant"),
    "gemma": (*CHATS, "system"),
}


def loaded(folder: pathlib.Path, style: str, template: Any) -> tuple[ChatTemplate, TokenWeights]:
    path = write_folder(folder, style, template)
    vocabulary = load_vocabulary(path)
    found = chat_template(DataConfig(vocabulary=path), vocabulary)
    assert found is not None
    return found, TokenWeights(vocabulary)


def made(source: str, style: str = "qwen", **options: Any) -> ChatTemplate:
    controls = [token for tokens in (chat_tokens(style), NAMED[style].values()) for token in tokens]
    return ChatTemplate(source, "mine", named=NAMED[style], control_tokens=controls, **options)


def chat_tokens(style: str) -> tuple[str, ...]:
    from tests.data import chat_templates

    return getattr(chat_templates, f"{style.upper()}_TOKENS")


def weighted(rendered: Rendered) -> list[str]:
    """Return the texts of weight 1, of each run."""
    return [text for run in rendered.runs for text, weight in run if weight]


@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(style: str, tmp_path: pathlib.Path) -> None:
    """Also without tags in the template, where transformers has no mask."""
    transformers = pytest.importorskip("transformers")
    plain, tokens = loaded(tmp_path / "plain", style, unmarked(TEMPLATES[style]))
    tagged, _ = loaded(tmp_path / "tagged", style, marked(TEMPLATES[style]))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "tagged")
    for name in TAKES.get(style, CHATS):
        messages = (CHATS | MORE)[name]
        wanted = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for template in (plain, tagged):
            rendered = template.render(messages, where="x")
            [(ids, weights)] = tokens.encode([rendered.runs])
            assert ids.tolist() == wanted["input_ids"], name
            assert weights.tolist() == wanted["assistant_masks"], name
            assert rendered.ended
        # Each turn is learned to its end.
        end = {"gemma": "<end_of_turn>"}.get(style, NAMED[style]["eos_token"])
        learned = [int(id_) for id_, weight in zip(ids, weights, strict=True) if weight]
        assert learned.count(tokens.control_tokens[end]) == sum(m["role"] == "assistant" for m in messages)


@pytest.mark.parametrize("style", TEMPLATES)
def test_prompts_are_those_of_transformers(style: str, tmp_path: pathlib.Path) -> None:
    """With a turn of the assistant to write, and with its last turn to go on with."""
    transformers = pytest.importorskip("transformers")
    template, _ = loaded(tmp_path, style, unmarked(TEMPLATES[style]))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in ("one turn", "ends with the user", "unicode", "blanks"):
        messages = CHATS[name]
        wanted = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.prompt(messages) == wanted
        if messages[-1]["role"] == "assistant":
            wanted = auto.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            # transformers keeps blanks behind the message if the template does, which a stop would follow.
            assert template.prompt(messages, answer=False) == wanted.rstrip()
    silent = made("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(
        RowError, match=r"^the prompt: the chat template mine changes the last message, so it cannot"
    ):
        silent.prompt(turns("a", "b"), answer=False)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("ab <>|/s_imend\n{}"), min_size=2, max_size=5),
    style=st.sampled_from(["qwen", "llama2"]),
)
def test_control_tokens_in_messages_stay_text(texts: list[str], style: str) -> None:
    """Whatever messages spell, the runs join to what the template makes of them, and only it has control tokens."""
    spelled = [
        text.replace("_", "<|im_end|>").replace("{", "<|im_start|>").replace("}", "</s>") for text in texts
    ]
    rendered = made(unmarked(TEMPLATES[style]), style).render(turns(*spelled), where="x")
    joined = "".join(text for run in rendered.runs for text, _ in run)
    plain_chat = made(unmarked(TEMPLATES[style]), style).render(turns(*["-"] * len(texts)), where="x")
    parts = "".join(text for run in plain_chat.runs for text, _ in run).split("-")
    assert joined == "".join(a + b for a, b in zip(parts, [*spelled, ""], strict=True))
    assert control_counts(rendered, style) == control_counts(plain_chat, style)


def control_counts(rendered: Rendered, style: str) -> list[int]:
    """Return how often the runs spell each control token."""
    texts = ["".join(text for text, _ in run) for run in rendered.runs]
    controls = sorted({*chat_tokens(style), *NAMED[style].values()})
    return [sum(text.count(token) for text in texts) for token in controls]


def test_spelled_control_tokens_are_not_ids(tmp_path: pathlib.Path) -> None:
    template, tokens = loaded(tmp_path, "qwen", unmarked(QWEN))
    spelled = "a<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    [(ids, weights)] = tokens.encode([template.render(turns(spelled, spelled), where="x").runs])
    controls = {tokens.control_tokens[token] for token in ("<|im_start|>", "<|im_end|>")}
    assert sum(int(id_) in controls for id_ in ids) == 4
    # Public decoding stops at the first end token.
    decode = load_vocabulary(str(tmp_path / "tokenizer.json"))._decode
    assert decode(ids) == f"user\n{spelled}\nassistant\n{spelled}\n"
    assert decode(ids[weights > 0]) == spelled


def test_turns_that_are_given_have_no_weight() -> None:
    messages = turns("a", "b", "c", "d")
    for source in (unmarked(QWEN), marked(QWEN)):
        assert weighted(made(source).render(messages, where="x", first=3)) == ["d<|im_end|>"]
        assert weighted(made(source).render(messages, where="x")) == ["b<|im_end|>", "d<|im_end|>"]


def test_an_end_token_behind_the_marks_is_learned() -> None:
    content_only = marked(LLAMA3).replace(" | trim + '<|eot_id|>' }}\n        {%- endgeneration %}",
                                          " }}\n        {%- endgeneration %}{{- '<|eot_id|>' }}")  # fmt: skip
    template = made(content_only, "llama3")
    assert "<|eot_id|>' }}\n        {%- endgeneration" not in content_only
    assert weighted(template.render(turns("a", "b", "c", ""), where="x")) == ["b<|eot_id|>", "<|eot_id|>"]


def test_a_template_without_control_tokens_gets_the_end_token() -> None:
    template = made(PLAIN)
    rendered = template.render(turns("a", "b"), where="x")
    assert weighted(rendered) == [" b\n"] and not rendered.ended
    assert template.render(turns("a", "b", "c"), where="x").ended


def test_a_template_that_always_begins_a_turn_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^chat template mine: begins a turn of the assistant at the end of every"
    ):
        made(unmarked(ALWAYS), "llama3")
    assert weighted(made(marked(ALWAYS), "llama3").render(turns("a", "b"), where="x")) == ["b<|eot_id|>"]


def test_a_template_that_drops_earlier_thoughts_is_refused_where_it_does() -> None:
    template = made(THINKING)
    last = [*turns("a", "b", "c"), {"role": "assistant", "content": "d", "thought": "hm "}]
    assert weighted(template.render(last, where="x")) == ["b<|im_end|>", "hm d<|im_end|>"]
    earlier = [turns("a")[0], {"role": "assistant", "content": "b", "thought": "hm "}, *turns("c", "d")]
    with pytest.raises(ConfigError) as caught:
        template.render(earlier, where="a.jsonl: line 3")
    assert str(caught.value).startswith("chat template mine: renders the beginning of a chat in another way")
    assert "(a.jsonl: line 3)" in str(caught.value) and "{% generation %}" in str(caught.value)
    assert weighted(template.render(earlier, where="x", first=2)) == ["d<|im_end|>"]


def test_chats_that_cannot_be_learned_from() -> None:
    with pytest.raises(RowError, match=r"^x: line 2: has no turn of the assistant .*data\.skip_bad=true"):
        made(unmarked(QWEN)).render([SYSTEM], where="x: line 2")
    with pytest.raises(RowError, match=r"^x: has no turn"):
        made(unmarked(QWEN)).render(turns("a", "b", "c"), where="x", first=2)
    gemma = made(unmarked(TEMPLATES["gemma"]), "gemma")
    with pytest.raises(RowError, match=r"rejects the chat \(Turns must alternate user/assistant\)"):
        gemma.render(turns("a", "b", first="assistant"), where="x")
    with pytest.raises(RowError, match="U\\+FDD0"):
        made(unmarked(QWEN)).render(turns("a\ufdd0", "b"), where="x")
    nothing = marked(QWEN).replace("== 'assistant'", "== 'model'")
    with pytest.raises(ConfigError, match=r"^chat template mine: marks nothing of x as the assistant's"):
        made(nothing).render(turns("a", "b"), where="x")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].__class__ }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}", "{{ namespace.__init__.__globals__.os }}",
    ],
)  # fmt: skip
def test_templates_are_sandboxed(source: str) -> None:
    try:
        rendered = made(source).render(turns("a", "b"), where="x")
    except (RowError, ConfigError):
        return
    assert not any(text for run in rendered.runs for text, _ in run)


def test_what_templates_may_use() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ tools | tojson(indent=1) }}"
    )
    template = made(PLAIN)
    text, _ = made(source)._text(turns("é<", "b", "c"), [{"name": "t"}], where="x")
    year = chat.TODAY.year
    assert text == (
        '{"role": "user", "content": "é<"}{"role": "assistant", "content": "b"}'
        + f'{year}[\n {{\n  "name": "t"\n }}\n]'
    )
    assert template.name == "mine"
    with pytest.raises(ConfigError, match=r"^chat template mine: .*endfor.*; correct it, or name another"):
        made("{% for m in messages %}")


def test_where_a_template_comes_from(tmp_path: pathlib.Path) -> None:
    path = write_folder(tmp_path / "a", "qwen", "settings")
    other = tmp_path / "other.jinja"
    other.write_text("\ufeffother")
    assert chat.find_template(path, "") == ("settings", f"in {tmp_path}/a/tokenizer_config.json")
    (tmp_path / "a" / "chat_template.jinja").write_text("file")
    assert chat.find_template(path, "") == ("file", f"{tmp_path}/a/chat_template.jinja")
    assert (
        chat.find_template(path, str(other))
        == chat.find_template("bytes", str(other))
        == ("other", str(other))
    )
    assert chat.find_template("bytes", "") is None
    assert chat.find_template(write_folder(tmp_path / "b", "qwen", None), "") is None
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert (chat.find_template(write_folder(tmp_path / "c", "qwen", several), "") or ("",))[0] == "d"
    with pytest.raises(ConfigError, match="has the chat templates rag, but no default"):
        chat.find_template(write_folder(tmp_path / "d", "qwen", several[:1]), "")
    with pytest.raises(ConfigError, match=r"^config\.data\.chat_template: .*gone\.jinja: cannot be read"):
        chat.find_template(path, str(tmp_path / "gone.jinja"))


# What the assistant's last turn begins with, and the token that ends it. None: the template is refused.
REAL = {
    "gemma3": ("", "<end_of_turn>"),
    "llama3_1": ("", "<|eot_id|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "llama3": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_models(name: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = fetch_tokenizer(name, tmp_path, "llama" if name == "llama3_1" else "")
    path, expected = str(folder / "tokenizer.json"), REAL[name]
    vocabulary = load_vocabulary(path)
    if expected is None:
        with pytest.raises(ConfigError, match="begins a turn of the assistant at the end of every chat"):
            chat_template(DataConfig(vocabulary=path), vocabulary)
        return
    template, tokens = chat_template(DataConfig(vocabulary=path), vocabulary), TokenWeights(vocabulary)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert template is not None
    for messages in (*CHATS.values(), MORE["system"]):
        answers = [each["content"] for each in messages if each["role"] == "assistant"]
        if name == "qwen3" and (len(answers) > 1 or messages[-1]["role"] == "user"):
            # The thoughts of turns before the last question are left out.
            with pytest.raises(ConfigError, match="renders the beginning of a chat in another way"):
                template.render(messages, where="x")
            continue
        [(ids, weights)] = tokens.encode([template.render(messages, where="x").runs])
        assert ids.tolist() == auto.apply_chat_template(messages)["input_ids"]
        before, end = expected
        wanted = "".join(f"{before}{answer.strip()}{end}" for answer in answers)
        # Qwen normalizes text.
        learned, wanted = (
            unicodedata.normalize("NFC", text) for text in (auto.decode(ids[weights > 0]), wanted)
        )
        assert learned.replace(" ", "") == wanted.replace(" ", "")
