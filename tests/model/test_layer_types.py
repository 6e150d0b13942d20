"""Decoders with two types of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.memories.window_cache import visible_blocks
from fam_jax.model.layer_types import layer_types
from tests.model.tiny import Reader, build, params_of, some_tokens, variant

MIXED = variant(layer_pattern=("local", "local", "global"), local_window=4, num_layers=5, segments=2)


def test_the_pattern_is_repeated_and_may_end_anywhere():
    types = layer_types(MIXED)
    local, of_all = types.memories
    assert (local.model.memory.kind, local.model.memory.window) == ("bswa", 4)
    assert of_all is types.main and of_all.model == MIXED
    np.testing.assert_array_equal(types.of_layers, [0, 0, 1, 0, 0])


def test_a_window_reaches_into_as_many_blocks_as_it_must():
    reach = [visible_blocks(variant(window=w, segments=2)) for w in (0, 1, 2, 5, 6, 9)]
    assert reach == [2, 0, 1, 1, 2, 2]


def test_local_layers_alone_are_sliding_window_attention():
    config = variant(layer_pattern=("local",), local_window=6, segments=2)
    window = variant(window=6, segments=2, length=0)
    tokens = some_tokens(2, 14)
    # The initial FAM exists, but no layer reads it.
    logits = [Reader(c, params_of(c), 2).read(tokens, aligned=True) for c in (config, window)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        config = variant(layer_pattern=("local", "global"), local_window=4, num_layers=num_layers)

        def loss(params, memory):
            return build(config, params)(jnp.zeros((1, 8), jnp.int32), memory, aligned=True)[0].sum()

        params = params_of(config)
        memory = build(config, params).init_state(1)
        return str(jax.make_jaxpr(jax.grad(loss))(params, memory)).count("=")

    assert size(2) == size(7)
