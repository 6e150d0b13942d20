"""An export for PyTorch: transformers computes what JAX computes, memory included, and it can be imported again."""

import ast
import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fam_jax.checkpoint import load_params
from fam_jax.config import UserError
from fam_jax.generation.streaming import Streamer
from fam_jax.hf import ConvertError, Folder, export_folder, import_parameters, imported_config, torch_config
from fam_jax.hf.torch_model import KINDS, OPTIONS
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.registry import memory_kinds
from fam_jax.memories.window import (
    BlockSlidingWindowConfig,
    FullConfig,
    SlidingWindowConfig,
    TransformerXLConfig,
)
from launch import export_hf, import_hf
from tests.hf.recorded import DATA, NAMES, VOCABULARY, imported, one_device, recorded_tokens
from tests.model.tiny import Reader, build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 logits of the order of 1, by two libraries
TOKENS = recorded_tokens()
CODE = pathlib.Path(__file__).parents[2] / "fam_jax" / "hf" / "assets" / "modeling_fam.py"

# A case: the recorded model, and the fields that differ from those of a model with blocks of 4 tokens and no FAM.
FAM = {"length": 3, "segments": 1, "window": 0}
LOCAL = {"length": 3, "segments": 2}  # local layers see up to 6 tokens
CASES = {
    "llama": ("llama", FAM),
    "llama3 prefix": ("llama3", FAM | {"init": "prefix"}),
    "mistral swa": ("mistral", {"memory": SlidingWindowConfig(window=6)}),
    "qwen2": ("qwen2_windows", LOCAL),
    "qwen3 window": ("qwen3", {"length": 4, "segments": 2, "window": 6, "previous_blocks": 3}),
    "gemma": ("gemma", FAM | {"positions": "float"}),
    "gemma2 zero": ("gemma2", LOCAL | {"positions": "zero", "previous_blocks": 2, "bound": 0.5}),
    "gemma3": ("gemma3", LOCAL),
}
MORE_CASES = {
    **{f"all {name}": (name, LOCAL | {"window": 0}) for name in NAMES},
    **{f"bounded {name}": (name, LOCAL | {"bound": 1.0}) for name in NAMES},
    "llama no past": ("llama", {"length": 1, "segments": 0}),
    "qwen2 full": ("qwen2", {"memory": FullConfig(context=10)}),
    "gemma3 bswa": ("gemma3", {"memory": BlockSlidingWindowConfig(segments=2)}),
    "llama transformer_xl": ("llama", {"memory": TransformerXLConfig(segments=2, window=7)}),
} | {
    f"{name} {init} {positions} {previous}": (
        name,
        LOCAL | {"init": init, "positions": positions, "previous_blocks": previous},
    )
    for name in ("llama3", "gemma3")
    for init in ("prompt", "prefix")
    for positions in ("last", "float", "zero")
    for previous in (1, 2)
}
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items()]
    + [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE_CASES.items()],
)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """Let transformers keep the code that it loads in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf"))
        )
        patch.setattr(sys, "path", [*sys.path])  # that folder is added to it
        yield


def export(out, name, changes, **how):
    """Export a recorded model with a memory; return config and parameters."""
    config, params = imported(DATA / name, **changes)
    export_folder(out, config, params, torch_config(config, {}), **how)
    return config, params


def load(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


def read(model, tokens, **how):
    """Return the logits of tokens (B, T), and the cache."""
    with torch.no_grad():
        out = model(torch.tensor(tokens.tolist()), **how)
    return out.logits.numpy(), out.past_key_values


def read_in_pieces(model, tokens, sizes):
    cache, parts = None, []
    for piece in np.split(tokens, np.cumsum(sizes), axis=1):
        logits, cache = read(model, piece, past_key_values=cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def generate(model, tokens, **how):
    ids = torch.tensor(tokens.tolist())
    how = {
        "max_new_tokens": 6,  # beyond the border of a block
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    } | how
    return model.generate(ids, **how).numpy()


@every_case
def test_logits_are_those_of_jax_however_the_text_is_divided(case, tmp_path):
    config, params = export(tmp_path / "out", *case)
    model = load(tmp_path / "out")
    logits = Reader(config, params, 2).read(TOKENS, aligned=True)
    np.testing.assert_allclose(read(model, TOKENS)[0], logits, **CLOSE)
    for sizes in ([8, 5, 1, 1], [1, 9, 2, 3]):
        np.testing.assert_allclose(read_in_pieces(model, TOKENS, sizes), logits, **CLOSE)
    assert_same(config, params, *imported_again(tmp_path / "out"))


def imported_again(folder):
    folder = Folder(folder)
    config = imported_config(folder).model
    return config, import_parameters(folder, config, one_device)


def assert_same(config, params, config_again, params_again):
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    assert [x.dtype for x in jax.tree.leaves(params_again)] == [x.dtype for x in jax.tree.leaves(params)]


@pytest.mark.parametrize(
    "case", ["llama", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "llama")]
)
def test_greedy_generation_is_that_of_jax(case, tmp_path):
    config, params = export(tmp_path / "out", *CASES[case])
    model, streamer = load(tmp_path / "out"), Streamer(config, params)
    found = streamer.generate(*streamer.read(TOKENS[:, :13]), max_tokens=6).tokens
    np.testing.assert_array_equal(generate(model, TOKENS[:, :13])[:, 13:], found)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a Gemma 3 with local layers and FAM, loaded by transformers."""
    folder = tmp_path_factory.mktemp("export") / "out"
    export(folder, *CASES["gemma3"])
    return load(folder)


def test_generation_goes_on_from_a_stream_that_was_read(model):
    """The ids of a prompt follow those that were read; the past is not passed again."""
    whole = generate(model, TOKENS)[:, TOKENS.shape[1] :]
    _, cache = read(model, TOKENS[:, :13])
    np.testing.assert_array_equal(generate(model, TOKENS[:, 13:], past_key_values=cache)[:, 8:], whole)
    np.testing.assert_array_equal(generate(model, TOKENS, use_cache=False)[:, TOKENS.shape[1] :], whole)
    beams = {"num_beams": 3, "max_new_tokens": 6}
    np.testing.assert_array_equal(
        generate(model, TOKENS[:, 13:], past_key_values=cache.select(torch.tensor([0, 0, 0, 1, 1, 1])), **beams)[:, 8:],
        generate(model, TOKENS, use_cache=False, **beams)[:, TOKENS.shape[1] :],
    )  # fmt: skip


def test_generation_ignores_the_kind_of_cache_that_a_base_model_asks_for(model):
    """As the generation_config.json of Gemma does."""
    _, cache = read(model, TOKENS[:, :13])
    expected = generate(model, TOKENS[:, 13:], past_key_values=cache)
    for kind in ("hybrid", "static"):
        found = generate(model, TOKENS[:, 13:], past_key_values=cache, cache_implementation=kind)
        np.testing.assert_array_equal(found, expected)


def test_padding_leaves_no_trace(model):
    lengths = [21, 10]
    mask = np.arange(21) >= 21 - np.array(lengths)[:, None]
    alone = [read(model, TOKENS[row : row + 1, 21 - n :]) for row, n in enumerate(lengths)]
    padded, cache = read(model, np.where(mask, TOKENS, 0), attention_mask=torch.as_tensor(mask))
    for row, (logits, own) in enumerate(alone):
        np.testing.assert_allclose(padded[row, mask[row]], logits[0], **CLOSE)
        for x, y in zip(own.layers, cache.select(torch.tensor([row])).layers, strict=True):
            for a, b in zip(x[2:], y[2:], strict=True):  # FAM; unused slots of the window may differ
                np.testing.assert_allclose(a, b, **CLOSE)
    found = generate(model, np.where(mask, TOKENS, 0), attention_mask=torch.as_tensor(mask))
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(
            found[row, 21:], generate(model, TOKENS[row : row + 1, 21 - n :])[0, n:]
        )


def test_the_cache_is_a_value_of_constant_size(model):
    def size(cache):
        return sum(x.numel() for layer in cache.layers for x in layer)

    def copy(cache):
        return [x.clone() for layer in cache.layers for x in layer]

    sizes = {size(read(model, np.tile(TOKENS, (1, n)))[1]) for n in (1, 5)}
    assert sizes == {size(read(model, TOKENS[:, :1])[1])}
    _, cache = read(model, TOKENS[:, :7])
    before = copy(cache)
    once, _ = read(model, TOKENS[:, 7:], past_key_values=cache)
    read(model, TOKENS[::-1, 7:], past_key_values=cache)
    again, _ = read(model, TOKENS[:, 7:], past_key_values=cache)
    np.testing.assert_array_equal(once, again)
    for a, b in zip(before, copy(cache), strict=True):
        np.testing.assert_array_equal(a, b)
    swapped, _ = read(model, TOKENS[::-1, 7:], past_key_values=cache.select(torch.tensor([1, 0])))
    np.testing.assert_allclose(swapped[::-1], once, **CLOSE)


def test_memory_reaches_beyond_the_window(model):
    """Tokens of the second block change logits far out of its reach, by FAM alone."""
    text = np.tile(TOKENS, (1, 9))
    changed = text.copy()
    changed[:, 4:8] = (changed[:, 4:8] + 1) % VOCABULARY
    differences = np.abs(read(model, text)[0] - read(model, changed)[0]).max(axis=(0, 2))
    assert not differences[:4].any()
    assert differences[-8:].max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradients_are_those_of_jax(stop_gradient, tmp_path):
    config, params = export(tmp_path / "out", "qwen3", LOCAL | {"stop_gradient": stop_gradient})
    weights = np.random.default_rng(1).normal(size=(*TOKENS.shape, VOCABULARY)).astype(np.float32)

    @jax.jit
    def gradients(params):
        def loss(params):
            model = build(config, params)
            return (model(TOKENS, model.init_state(2), aligned=True)[0] * weights).sum()

        return jax.grad(loss)(jax.tree.map(jnp.asarray, params))

    theirs = gradients(params)
    model = load(tmp_path / "out")
    (model(torch.as_tensor(TOKENS, dtype=torch.long)).logits * torch.as_tensor(weights)).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(model.model.memory.initial_fam.grad, theirs["memory"]["initial_fam"], **close)
    np.testing.assert_allclose(model.model.embed_tokens.weight.grad, theirs["embedding"]["table"], **close)
    np.testing.assert_allclose(
        model.model.layers[0].mlp["up_proj"].weight.grad.T, theirs["layers"]["up"]["kernel"][0], **close
    )


def test_labels_give_the_loss_of_the_next_tokens(model):
    tokens = torch.as_tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(read(model, TOKENS, logits_to_keep=2)[0], out.logits[:, -2:])


def test_rows_that_do_not_fit_are_refused(model):
    _, cache = read(model, TOKENS)
    masks = (torch.ones(2, 21), torch.ones(1, 20), torch.ones(1, 1, 21, 21))
    for how in ({"past_key_values": cache}, *({"attention_mask": mask} for mask in masks)):
        with pytest.raises(ValueError, match="expected past_key_values of 1 streams"):
            read(model, TOKENS[:1], **how)


def test_bfloat16_and_several_files(tmp_path):
    config, params = export(tmp_path / "out", *CASES["qwen3 window"], dtype="bfloat16", shard_bytes=3000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again, same = imported_again(tmp_path / "out")
    assert dataclasses.replace(again, dtype="float32") == config
    np.testing.assert_array_equal(same["memory"]["initial_fam"], params["memory"]["initial_fam"])
    assert load(tmp_path / "out").dtype == torch.bfloat16
    exact = Reader(config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), same), 2)
    logits = read(load(tmp_path / "out", dtype=torch.float32), TOKENS)[0]
    np.testing.assert_allclose(logits, exact.read(TOKENS, aligned=True), **CLOSE)
    # In bfloat16, FAM alone stays float32: it adds to itself at every block.
    narrow, cache = read(load(tmp_path / "out"), TOKENS)
    # Activations have a relative error of 2^-9 each.
    assert np.square(narrow - logits).mean() < (16 * 2**-9) ** 2 * np.square(logits).mean()
    assert {x.dtype for x in cache.layers[0]} == {torch.float32, torch.bfloat16}
    assert cache.layers[0].fam.dtype == torch.float32


@pytest.mark.parametrize("name", ["gemma2 zero", "llama3 prefix"])
def test_what_pytorch_saves_can_be_imported(name, tmp_path):
    config, params = export(tmp_path / "out", *CASES[name])
    model = load(tmp_path / "out")
    own = [x for path, x in model.named_parameters() if path.endswith("initial_fam")]
    with torch.no_grad():
        for x in own:
            x.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / CODE.name).read_bytes() == CODE.read_bytes()
    np.testing.assert_array_equal(read(load(tmp_path / "saved"), TOKENS)[0], read(model, TOKENS)[0])
    place = params["memory"] if "memory" in params else params["layers"]["memory"]
    place["initial_fam"] += 0.5
    assert_same(config, params, *imported_again(tmp_path / "saved"))


def run(entry, *arguments):
    assert entry.main([*map(str, arguments)]) == 0


def error_of(entry, *arguments):
    with pytest.raises(UserError) as caught:
        entry.main([*map(str, arguments)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint of the recorded Gemma 2 with FAM."""
    shutil.copytree(DATA / "gemma2", tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text()) | {"eos_token_id": 7}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    how = ("--tokenizer=none", "--block_size=4", "--memory_segments=2", "--fam_length=3")
    run(import_hf, "--source", tmp_path / "source", "--out", tmp_path / "ckpt", *how)
    return tmp_path / "ckpt"


def test_export_and_import_from_the_command_line(capsys, checkpoint, tmp_path):
    out, again, plain = (tmp_path / name for name in ("out", "again", "plain"))
    run(export_hf, "--checkpoint", checkpoint, "--out", out, "--with_fam")
    assert "for FamForCausalLM" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", CODE.name}
    assert load(out).config.eos_token_id == 7
    run(import_hf, "--source", out, "--out", again, "--tokenizer=none")
    (params, config, _), (same, config_again, _) = load_params(checkpoint), load_params(again)
    assert config_again["model"] == config["model"]
    jax.tree.map(np.testing.assert_array_equal, same, params)
    run(export_hf, "--checkpoint", again, "--out", tmp_path / "out2", "--with_fam")
    for file in out.iterdir():
        assert (tmp_path / "out2" / file.name).read_bytes() == file.read_bytes()
    run(export_hf, "--checkpoint", again, "--out", plain)
    assert json.loads((plain / "config.json").read_text())["model_type"] == "gemma2"
    assert (plain / "memory.safetensors").is_file()


def test_a_window_comes_back_as_it_was(capsys, checkpoint, tmp_path):
    out = tmp_path / "out"
    how = (
        "--tokenizer=none",
        "--block_size=4",
        "--config.model.memory.kind=swa",
        "--config.model.memory.window=7",
    )
    run(import_hf, "--source", tmp_path / "source", "--out", tmp_path / "swa", *how)
    assert "equal to the original for the first 7 tokens" in capsys.readouterr().err
    run(export_hf, "--checkpoint", tmp_path / "swa", "--out", out, "--with_fam")
    run(import_hf, "--source", out, "--out", tmp_path / "again", "--tokenizer=none")
    assert "equal to the original" not in capsys.readouterr().err
    (params, config, _), (same, config_again, _) = (
        load_params(tmp_path / "swa"),
        load_params(tmp_path / "again"),
    )
    assert config_again["model"] == config["model"]
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_stored_fam_can_be_left_out_or_replaced(checkpoint, tmp_path):
    out = tmp_path / "out"
    run(export_hf, "--checkpoint", checkpoint, "--out", out, "--with_fam")
    how = ("--source", out, "--tokenizer=none")
    run(import_hf, *how, "--out", tmp_path / "without", "--fam_length=0")
    assert "memory" not in load_params(tmp_path / "without")[0]
    says = (
        f"{out}: memory/initial_fam has shape [3, 16], but the model needs shape [2, 16]; set the fields of the memory "
        "to those that it was trained with, or choose a memory without it"
    )
    assert error_of(import_hf, *how, "--out", tmp_path / "shorter", "--fam_length=2") == says
    assert "is missing, but the model needs" in error_of(
        import_hf, *how, "--out", tmp_path / "prefix", "--fam_init=prefix"
    )


def test_what_the_code_cannot_compute_is_refused_by_name(checkpoint, tmp_path):
    assert set(KINDS) <= set(memory_kinds())
    config, _ = imported(DATA / "llama", length=3)

    @dataclasses.dataclass(frozen=True)
    class Other(FamConfig):
        kind: str = "other"

    with pytest.raises(ConvertError, match=r"config.model.memory.kind: modeling_fam.py cannot compute other"):
        torch_config(dataclasses.replace(config, memory=Other(length=2)), {})
    with pytest.raises(ConvertError, match=r"config.model.norm: 'layernorm' cannot be expressed"):
        torch_config(dataclasses.replace(config, norm="layernorm"), {})
    says = error_of(
        export_hf, "--checkpoint", checkpoint, "--out", tmp_path / "out", "--with_fam", "--lora=adapter"
    )
    assert "leave out --with_fam" in says
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_may_be_left_out_of_a_config(tmp_path):
    """As transformers 4 does when it saves the model."""
    config, params = export(tmp_path / "out", *CASES["llama3 prefix"])
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("tie_word_embeddings") is True
    path.write_text(json.dumps(fields))
    assert_same(config, params, *imported_again(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory": None}, "memory is missing"),
        ({"block_size": 0}, "block_size: expected a positive integer, got 0"),
        ({"memory": [1]}, "memory: expected a JSON object"),
        ({"base_model_type": "gpt2"}, "(model_type gpt2) is not supported"),
        ({"qk_norm": True}, "qk_norm is true, but base_model_type llama needs false"),
        ({"auto_map": 3}, "auto_map: expected a JSON object, got 3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type yarn is not supported"),
        ({"memory": {"kind": "unknown"}}, "config.model.memory.kind: expected one of"),
    ],
)  # fmt: skip
def test_a_changed_config_is_refused_by_name(changes, says, tmp_path):
    export(tmp_path / "out", "llama", FAM)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        imported_again(tmp_path / "out")
    assert says in str(caught.value)


def test_a_config_that_does_not_describe_the_model_is_refused(tmp_path):
    config, params = imported(DATA / "llama", **FAM)
    for changes, field in (({"length": 2}, "memory"), ({"segments": 2}, "memory")):
        other = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes))
        with pytest.raises(ConvertError, match=f"config.model.{field}"):
            export_folder(tmp_path / "out", config, params, torch_config(other, {}))
    with pytest.raises(ConvertError, match=r"config.model.block_size"):
        export_folder(
            tmp_path / "out", config, params, torch_config(dataclasses.replace(config, block_size=8), {})
        )


def test_a_tensor_that_is_not_expected_is_named(tmp_path):
    export(tmp_path / "out", "llama", FAM)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.other"] = tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(ConvertError, match=r"tensor model.other in model.safetensors is not expected"):
        imported_again(tmp_path / "out")


def test_layers_whose_initial_fams_differ_in_shape_are_refused(tmp_path):
    export(tmp_path / "out", *CASES["llama3 prefix"])
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.memory.initial_fam"] = tensors["model.layers.1.memory.initial_fam"][:2].copy()
    save_file(tensors, file)
    with pytest.raises(
        ConvertError, match=r"layers/memory/initial_fam is missing, but the model needs shape"
    ):
        imported_again(tmp_path / "out")


def test_options_are_those_of_no_base_model():
    for name in NAMES:
        assert not OPTIONS.keys() & json.loads((DATA / name / "config.json").read_text()).keys()


def test_the_code_is_short_and_needs_torch_and_transformers_only():
    source = CODE.read_text()
    assert len(source.splitlines()) <= 400
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    modules |= {
        a.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for a in node.names
    }
    assert {name.split(".")[0] for name in modules} == {
        "dataclasses",
        "math",
        "typing",
        "torch",
        "transformers",
    }
