"""The state of streams as a value: its shapes, its constant size, and its methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.model import (
    StreamState,
    Transformer,
    count_parameters,
    empty_state,
    from_dict,
    to_dict,
    with_passed_on,
)
from tests.model.tiny import Reader, build, params_of, some_tokens, variant
from tests.oracle.naive import random_params


def struct(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


CONFIGS = [
    {},
    {"init": "prefix"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "init": "prefix"},
    {"dtype": "bfloat16", "norm": "layernorm", "positions": "zero"},
    {"length": 0},
    {"segments": 0},
    {"dtype": "bfloat16", "length": 0, "segments": 0},
    {"previous_blocks": 3, "segments": 2},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_memory_never_changes_its_shape_or_dtype(changes):
    config = variant(**changes)
    params = params_of(config)
    want = struct(empty_state(config, 3))

    def start():
        return build(config, params).init_state(3)

    assert struct(jax.eval_shape(start)) == want
    for length, how in ((3, {}), (1, {}), (9, {}), (9, {"aligned": True}), (2, {"aligned": True})):

        def call(memory, length=length, how=how):
            return build(config, params)(jnp.zeros((3, length), jnp.int32), memory, **how)

        logits, memory = jax.eval_shape(call, empty_state(config, 3))
        assert struct(memory) == want, (length, how)
        assert logits.shape == (3, length, config.vocab_size) and logits.dtype == jnp.float32


def test_memory_does_not_grow_with_what_is_read():
    """The size follows from C, m, M, R and the batch, never from T."""
    config = variant(segments=3, previous_blocks=2)
    kv = config.num_kv_heads * config.head_dim
    per_row = config.num_layers * (
        2 * (config.memory.segments + 1) * config.block_size * kv
        + config.memory.length * config.model_dim
        + 2 * config.memory.previous_blocks * config.memory.length * kv
    )
    assert count_parameters(empty_state(config, 5)) == 5 * (per_row + 3)


def test_memory_is_a_pytree():
    memory = empty_state(variant(), 2)
    leaves, structure = jax.tree.flatten(memory)
    assert isinstance(jax.tree.unflatten(structure, leaves), StreamState)
    assert len(leaves) == 10
    # All arrays have the batch axis in the same place.
    assert {x.shape[1] for x in jax.tree.leaves(memory.layers)} == {2}
    assert {x.shape for x in jax.tree.leaves(memory.position)} == {(2,)}


def test_an_old_memory_can_be_read_on_from_again():
    """Reading does not change the state that goes in, so streams can fork."""
    config = variant()
    reader = Reader(config, params_of(config), 2)
    reader.read(some_tokens(2, 6))
    fork = reader.state
    first = reader.read(some_tokens(2, 6, seed=1))
    reader.state = fork
    other = reader.read(some_tokens(2, 6, seed=2))
    reader.state = fork
    np.testing.assert_array_equal(reader.read(some_tokens(2, 6, seed=1)), first)
    assert np.abs(first - other).max() > 1e-3


def test_counters():
    config = variant()
    reader = Reader(config, params_of(config), 3)
    reader.read(some_tokens(3, 9), lengths=[9, 4, 3])
    memory = reader.state
    assert memory.position.blocks.tolist() == [2, 1, 0] and memory.position.filled.tolist() == [1, 0, 3]
    assert memory.position.carries_context.tolist() == [True, True, False]
    plain = Reader(variant(length=0), params_of(variant(length=0)), 1)
    plain.read(some_tokens(1, 8), aligned=True)
    assert not plain.state.position.carries_context.any()  # there is no FAM that could


def test_state_passing_touches_the_chosen_rows_only():
    memory = empty_state(variant(), 3)
    fam = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 8)), jnp.float32)
    after = with_passed_on(memory, {"fam": fam}, jnp.array([True, False, True]))
    np.testing.assert_array_equal(after.layers.fam[:, 0], fam)
    np.testing.assert_array_equal(after.layers.fam[:, 1], 0)
    assert after.position.carries_context.tolist() == [True, False, True]
    assert struct(after) == struct(memory)


@pytest.mark.parametrize(
    ("length", "how", "message"),
    [
        (0, {}, "there are none"),
        (4, {"aligned": True, "lengths": jnp.array([1, 2])}, "an aligned call does not take it"),
        (4, {"position_offset": jnp.array([1, 2])}, "only aligned calls take it"),
    ],
)
def test_calls_that_make_no_sense_are_refused(length, how, message):
    config = variant()
    with pytest.raises(ValueError, match=message):
        build(config, params_of(config))(jnp.zeros((2, length), jnp.int32), empty_state(config, 2), **how)


def test_a_state_is_shown_by_the_shapes_of_its_arrays():
    """In a notebook, its numbers would fill pages."""
    shown = repr(empty_state(variant(), 2))
    assert shown.startswith("StreamState(layers.") and "layers.keys: float32[" in shown
    assert len(shown) < 1000 and "Array" not in shown


@pytest.mark.parametrize("wrong", [-1, 64])
def test_tokens_that_are_no_ids_are_refused(wrong):
    config = variant(vocab_size=64)
    model, state = build(config, params_of(config)), empty_state(config, 2)
    for tokens in (jnp.array([[0, 1], [2, wrong]]), np.array([[wrong], [3]])):
        with pytest.raises(
            ValueError, match=f"{wrong} is not an id of the vocabulary; give ids from 0 to 63"
        ):
            model(tokens, state)
    # Padding is no text, and in a compiled function the values are not known.
    model(jnp.array([[0, wrong], [2, 3]]), state, lengths=jnp.array([1, 2]))
    jax.jit(lambda tokens: model(tokens, state)[0])(jnp.array([[wrong], [3]]))


@pytest.mark.slow
def test_bfloat16_activations_read_nearly_alike():
    tokens = some_tokens(2, 17)

    def loss(config):
        logits = Reader(config, params_of(config), 2).read(tokens[:, :-1], aligned=True)
        assert logits.dtype == np.float32
        log_p = jax.nn.log_softmax(logits)
        return -float(np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1).mean())

    for changes in ({}, {"init": "prefix", "norm": "layernorm"}):
        # Each activation has a relative error of 2^-8; the error of the mean over 32 tokens is a few times that.
        assert abs(loss(variant(dtype="bfloat16", **changes)) - loss(variant(**changes))) < 4 * 2**-8


# ---- parameters


def new_parameters(config, seed=0):
    return jax.jit(lambda: to_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed)))))()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layernorm", "tie_embeddings": False, "activation": "gelu"},
        {"init": "prefix"},
        {"length": 0},
    ],
    ids=str,
)
def test_parameters_have_the_names_and_shapes_of_the_format(changes):
    config = variant(**changes)
    values = new_parameters(config)
    assert jax.tree.map(jnp.shape, values) == jax.tree.map(np.shape, random_params(config, 0))
    assert {x.dtype for x in jax.tree.leaves(values)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_float32_whatever_the_activations(dtype):
    model = nnx.eval_shape(lambda: Transformer(variant(dtype=dtype), rngs=nnx.Rngs(0)))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def test_a_new_model_guesses_evenly():
    config = variant(model_dim=64, num_heads=4, head_dim=16, ff_dim=128)
    params = new_parameters(config)
    log_p = jax.nn.log_softmax(Reader(config, params, 4).read(some_tokens(4, 64), aligned=True))
    loss = -np.take_along_axis(np.asarray(log_p), some_tokens(4, 64, seed=1)[..., None], axis=-1).mean()
    assert abs(loss - np.log(config.vocab_size)) < 1.0
    layers = params["layers"]["query"]["kernel"]
    assert np.abs(layers[0] - layers[1]).max() > 0.01  # layers have different initial values
    other = new_parameters(config, seed=1)
    assert np.abs(layers - other["layers"]["query"]["kernel"]).max() > 0.01


def test_parameters_go_to_a_dict_and_back():
    config = variant()
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    values = new_parameters(config)
    filled = from_dict(state, values)
    jax.tree.map(np.testing.assert_array_equal, to_dict(filled), values)
    doubled = from_dict(filled, jax.tree.map(lambda x: 2 * x, values))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), to_dict(doubled), values)
    # `from_dict` does not change its first argument.
    jax.tree.map(np.testing.assert_array_equal, to_dict(filled), values)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))


def test_parameters_that_do_not_fit_are_named():
    config = variant()
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    good = to_dict(state)
    cases = {
        "final_norm/scale is missing": {k: v for k, v in good.items() if k != "final_norm"},
        "extra is not expected": {**good, "extra": jnp.zeros(1)},
        r"memory/initial_fam has shape \(3, 8\), not \(2, 8\)": {
            **good,
            "memory": {"initial_fam": jnp.zeros((3, 8))},
        },
    }
    for message, values in cases.items():
        with pytest.raises(ValueError, match=message):
            from_dict(state, values)


# ---- size


def paper_size(layers, width, multiplier, heads, kv_heads):
    return ModelConfig(
        vocab_size=256_000,
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        ff_dim=width * multiplier,
        block_size=1024,
        dtype="bfloat16",
        remat="full",
        memory=FamConfig(segments=3, length=64),
    )


SIZES = {
    "1B": (paper_size(18, 1536, 8, 12, 12), 1.19e9),
    "8B": (paper_size(32, 4096, 4, 32, 32), 8.6e9),
    "24B": (paper_size(56, 4096, 8, 32, 1), 24.5e9),
}


@pytest.mark.parametrize(("config", "parameters"), SIZES.values(), ids=SIZES)
def test_the_paper_s_models(config, parameters):
    """Sizes of table 3, without the embedding table. Traced at 8k tokens; nothing is computed."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    count = count_parameters(state) - config.vocab_size * config.model_dim
    assert count == pytest.approx(parameters, rel=0.01)

    def loss(state, tokens):
        hidden, memory = nnx.merge(graphdef, state).hidden(tokens, empty_state(config, 2), aligned=True)
        return hidden.astype(jnp.float32).sum(), memory

    tokens = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    gradients, memory = jax.eval_shape(jax.grad(loss, has_aux=True), state, tokens)
    assert struct(gradients) == struct(state)
    assert struct(memory) == struct(jax.eval_shape(lambda: empty_state(config, 2)))


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def size(num_layers, aligned):
        config = variant(num_layers=num_layers)
        params = params_of(config)
        tokens = jnp.zeros((1, 8), jnp.int32)

        def loss(params):
            return build(config, params)(tokens, empty_state(config, 1), aligned=aligned)[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("\n")

    for aligned in (True, False):
        assert size(5, aligned) == size(13, aligned)
