"""Decoders whose layers are of two kinds."""

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.model.layer_types import kind_of_layers, kinds_of, visible_segments
from tests.model.tiny import Reader, build, params_of, some_tokens, variant

MIXED = variant(layer_pattern=("local", "local", "global"), local_window=4, num_layers=5, memory_segments=2)


def test_the_pattern_is_repeated_and_may_end_anywhere():
    local, of_all = kinds_of(MIXED)
    assert (local.config.window, local.config.fam_length) == (4, 0)
    assert of_all.config == MIXED
    np.testing.assert_array_equal(kind_of_layers(MIXED), [0, 0, 1, 0, 0])


def test_a_window_reaches_into_as_many_blocks_as_it_must():
    reach = [visible_segments(variant(window=w, memory_segments=2)) for w in (0, 1, 2, 5, 6, 9)]
    assert reach == [2, 0, 1, 1, 2, 2]


def test_local_layers_alone_are_sliding_window_attention():
    config = variant(layer_pattern=("local",), local_window=6, memory_segments=2)
    window = variant(window=6, memory_segments=2, fam_length=0)
    tokens = some_tokens(2, 14)
    # The initial FAM is there, but no layer looks at it.
    logits = [Reader(c, params_of(c), 2).read(tokens, aligned=True) for c in (config, window)]
    np.testing.assert_array_equal(*logits)


def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        config = variant(layer_pattern=("local", "global"), local_window=4, num_layers=num_layers)

        def loss(params, memory):
            return build(config, params)(jnp.zeros((1, 8), jnp.int32), memory, aligned=True)[0].sum()

        params = params_of(config)
        memory = build(config, params).init_memory(1)
        return str(jax.make_jaxpr(jax.grad(loss))(params, memory)).count("=")

    assert size(2) == size(7)
