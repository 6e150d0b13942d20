"""Reading and generating through a state equal one forward pass over all tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.config import MeshConfig, UserError
from fam_jax.generation.sampling import Sampling
from fam_jax.generation.streaming import NotFiniteError, Streamer, plan_reads
from fam_jax.model import StreamState
from fam_jax.sharding import make_mesh, param_shardings
from tests.generation.tiny import CONFIG, forward, streamer, texts
from tests.model.tiny import params_of

CLOSE = {"atol": 2e-5, "rtol": 2e-5}  # float32, logits of order 1
RAGGED = (9, 33, 21)  # one set of lengths, so that few shapes are compiled
SAMPLED = Sampling(temperature=1.0, top_k=8, top_p=0.9)


@pytest.fixture(scope="module")
def ragged():
    """Return prompts of different lengths, the logits that follow them and the state."""
    prompts = texts(*RAGGED)
    return prompts, *streamer().read(prompts, chunk_blocks=2)


def expected_last(prompts) -> np.ndarray:
    return np.stack([forward(prompt)[-1] for prompt in prompts])


def assert_same_memory(found, expected, exact: bool = False) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if exact:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, **CLOSE)


def clean(memory):
    """Return the state with zeros in the unused slots of unfinished blocks, which may hold anything."""
    used = np.arange(CONFIG.block_size) < np.asarray(memory.position.filled)[:, None]
    layers = memory.layers
    keys, values = (
        jnp.where(used[None, :, :, None, None], x, 0) for x in (layers.block_keys, layers.block_values)
    )
    replace = type(layers)(**{**vars(layers), "block_keys": keys, "block_values": values})
    return type(memory)(**{**vars(memory), "layers": replace})


def test_prompts_of_different_lengths(ragged) -> None:
    prompts, logits, memory = ragged
    np.testing.assert_allclose(logits, expected_last(prompts), **CLOSE)
    np.testing.assert_array_equal(memory.tokens_read, RAGGED)


def test_a_row_does_not_depend_on_the_others(ragged) -> None:
    prompts, logits, memory = ragged
    alone, alone_memory = streamer().read([prompts[1]], chunk_blocks=2)
    np.testing.assert_allclose(logits[1:2], alone, **CLOSE)
    assert_same_memory(clean(memory.select([1])), clean(alone_memory))


def test_chunks_do_not_matter(ragged) -> None:
    prompts, logits, memory = ragged
    other, other_memory = streamer().read(prompts, chunk_blocks=1)
    np.testing.assert_allclose(other, logits, **CLOSE)
    assert_same_memory(clean(other_memory), clean(memory))


def test_reading_in_parts(ragged) -> None:
    """Rows continue from any place in their blocks; the state passed in does not change."""
    prompts, logits, memory = ragged
    cuts = (1, 6, 3)
    _, first = streamer().read([p[:cut] for p, cut in zip(prompts, cuts, strict=True)])
    before = jax.tree.map(np.array, first)
    rest = [p[cut:] for p, cut in zip(prompts, cuts, strict=True)]
    found, found_memory = streamer().read(rest, first, chunk_blocks=2)
    np.testing.assert_allclose(found, logits, **CLOSE)
    assert_same_memory(clean(found_memory), clean(memory))
    assert_same_memory(first, before, exact=True)


def test_memory_has_one_size(ragged) -> None:
    _, _, memory = ragged
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, streamer().start(3))


def test_progress() -> None:
    told = []
    streamer().read(texts(*RAGGED), chunk_blocks=2, on_progress=lambda *x: told.append(x))
    done = [x[0] for x in told]
    assert {x[1] for x in told} == {sum(RAGGED)} and done[-1] == sum(RAGGED) and sorted(set(done)) == done


@given(
    streams=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=4),
    chunk=st.integers(1, 9),
)
def test_plan(streams: list, chunk: int) -> None:
    filled, lengths = map(np.array, zip(*streams, strict=True))
    position, left = filled.copy(), lengths.copy()
    sizes = set()
    for counts, aligned in plan_reads(filled, lengths, 4, chunk):
        assert (counts <= left).all() and counts.any()
        if aligned:
            assert (position % 4 == 0).all() and len(set(counts)) == 1 and counts[0] % 4 == 0
            sizes.add(counts[0] // 4)
        else:
            assert counts.max() <= 4
        position, left = position + counts, left - counts
    assert not left.any()
    assert len(sizes) <= 3 and max(sizes, default=1) <= chunk
    if len(streams) == 1:
        assert bool(sizes) == (lengths[0] - -filled[0] % 4 >= 4)


def test_equal_prompts_go_through_whole_blocks() -> None:
    calls = list(plan_reads(np.zeros(2, int), np.array([75, 75]), 4, 16))
    assert [(counts.tolist(), aligned) for counts, aligned in calls] == [
        ([64, 64], True), ([4, 4], True), ([4, 4], True), ([3, 3], False),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def greedy(ragged):
    _, logits, memory = ragged
    return streamer().generate(logits, memory, max_tokens=10, tokens_per_call=4)


def test_greedy_is_the_argmax_of_the_forward_pass(ragged, greedy) -> None:
    assert greedy.tokens.shape == (3, 10) and greedy.tokens.dtype == np.int32
    assert not greedy.stopped.any() and (greedy.lengths == 10).all()
    for row, prompt in enumerate(ragged[0]):
        logits = forward(np.concatenate([prompt, greedy.tokens[row]]))
        scores = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
        np.testing.assert_array_equal(greedy.tokens[row], scores.argmax(-1))
        np.testing.assert_allclose(greedy.logprobs[row], scores.max(-1), **CLOSE)
        np.testing.assert_allclose(greedy.logits[row], logits[-1], **CLOSE)


def test_memory_holds_what_was_generated(ragged, greedy) -> None:
    prompts = ragged[0]
    read = [np.concatenate(pair) for pair in zip(prompts, greedy.tokens, strict=True)]
    _, memory = streamer().read(read, chunk_blocks=2)
    assert_same_memory(clean(greedy.state), clean(memory))


def test_generation_goes_on_where_it_ended(ragged, greedy) -> None:
    _, logits, memory = ragged
    first = streamer().generate(logits, memory, max_tokens=3, tokens_per_call=4)
    second = streamer().generate(first.logits, first.state, max_tokens=7, tokens_per_call=4)
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), greedy.tokens)
    assert_same_memory(second.state, greedy.state, exact=True)


def test_stop_tokens(ragged, greedy) -> None:
    _, logits, memory = ragged
    stop = int(greedy.tokens[0, 2])
    found = streamer().generate(logits, memory, max_tokens=10, tokens_per_call=4, stop_tokens=(stop, 99))
    for row, tokens in enumerate(greedy.tokens):
        where = np.flatnonzero(tokens == stop)
        length = where[0] + 1 if where.size else 10  # the stop token counts
        assert (found.lengths[row], found.stopped[row]) == (length, where.size > 0)
        np.testing.assert_array_equal(found.tokens[row, :length], tokens[:length])
        assert not found.tokens[row, length:].any() and not found.logprobs[row, length:].any()
    np.testing.assert_array_equal(found.state.tokens_read, RAGGED + found.lengths)
    # A row that has stopped keeps its state while others go on.
    assert found.lengths[0] <= 3 and found.stopped[0]
    length = int(found.lengths[0])
    short = streamer().generate(logits, memory, max_tokens=length, tokens_per_call=4)
    assert_same_memory(found.state.select([0]), short.state.select([0]), exact=True)
    np.testing.assert_array_equal(found.logits[0], short.logits[0])


def test_generation_ends_when_all_rows_have_stopped(ragged) -> None:
    _, logits, memory = ragged
    every = tuple(range(CONFIG.vocab_size))
    found = streamer().generate(logits, memory, max_tokens=10, tokens_per_call=4, stop_tokens=every)
    assert found.tokens.shape == (3, 1) and found.stopped.all()


def test_sampled_tokens_depend_on_the_key_alone(ragged) -> None:
    """They do not depend on how many leave the device together."""
    _, logits, memory = ragged
    told = []

    def run(seed: int, width: int) -> np.ndarray:
        how = {"sampling": SAMPLED, "key": jax.random.key(seed), "tokens_per_call": width}
        return (
            streamer()
            .generate(logits, memory, max_tokens=9, on_tokens=lambda *x: told.append(x), **how)
            .tokens
        )

    one, other, third = run(5, 4), run(5, 16), run(6, 4)
    np.testing.assert_array_equal(one, other)
    assert (one != third).any()
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in told[:3]], axis=1), one)
    assert [counts.tolist() for _, counts in told[:3]] == [[4] * 3, [4] * 3, [1] * 3]


def test_a_row_is_drawn_by_its_own_key(ragged) -> None:
    _, logits, memory = ragged
    keys = jax.random.split(jax.random.key(9), 3)
    how = {"max_tokens": 9, "sampling": SAMPLED, "tokens_per_call": 4}
    together = streamer().generate(logits, memory, key=keys, **how).tokens
    alone = streamer().generate(logits[1:2], memory.select([1]), key=keys[1:2], **how).tokens
    np.testing.assert_array_equal(alone, together[1:2])
    same = jnp.broadcast_to(logits[:1], logits.shape)
    drawn = streamer().generate(same, memory.select([0, 0, 0]), key=jax.random.key(1), **how).tokens
    assert len({tuple(row) for row in drawn.tolist()}) == 3  # one key draws for each row apart


def test_logits_that_are_not_finite(ragged) -> None:
    _, logits, memory = ragged
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(
            NotFiniteError, match=rf"row 2: the model's logits are not finite .* {RAGGED[2]} tokens"
        ):
            streamer().generate(logits.at[2, 3].set(value), memory, max_tokens=3, tokens_per_call=4)
    forbidden = logits.at[:, 3].set(-jnp.inf)
    assert streamer().generate(forbidden, memory, max_tokens=1, tokens_per_call=4).lengths.tolist() == [1] * 3


def test_score(ragged, greedy) -> None:
    prompts, logits, memory = ragged
    given_texts = texts(9, 2, 5, seed=1)
    found = streamer().score(given_texts, logits, memory)
    for prompt, text, (likeliest, logprobs) in zip(prompts, given_texts, found, strict=True):
        scores = jax.nn.log_softmax(forward(np.concatenate([prompt, text]))[len(prompt) - 1 : -1])
        np.testing.assert_array_equal(likeliest, scores.argmax(-1))
        np.testing.assert_allclose(logprobs, scores[np.arange(len(text)), text], **CLOSE)


def test_branches_of_a_memory(ragged) -> None:
    _, logits, memory = ragged
    branched = memory.select([2, 0, 0])
    found = streamer().generate(
        logits[jnp.array([2, 0, 0])],
        branched,
        max_tokens=3,
        sampling=SAMPLED,
        key=jax.random.key(0),
        tokens_per_call=4,
    )
    assert found.lengths.tolist() == [3, 3, 3]
    parts = [memory.select([row]) for row in range(3)]
    assert_same_memory(StreamState.join(parts), memory, exact=True)
    replaced = memory.replace_row(1, memory.select([2]))
    assert_same_memory(replaced, memory.select([0, 2, 2]), exact=True)
    for rows in ([3], [-1], []):
        with pytest.raises(UserError, match="0 to 2"):
            memory.select(rows)


@pytest.mark.slow
def test_spread_over_a_mesh(ragged) -> None:
    """Numbers of rows that the devices divide, and that they do not."""
    prompts, logits, _ = ragged
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices())
    params = params_of(CONFIG)
    sharded = Streamer(CONFIG, jax.device_put(params, param_shardings(params, mesh)))
    for rows in ([0, 1, 2, 1], [0, 1, 2]):
        found, memory = sharded.read([prompts[row] for row in rows], chunk_blocks=2)
        np.testing.assert_allclose(found, logits[np.array(rows)], **CLOSE)
        assert memory.position.filled.is_fully_replicated  # any process can read it
        spread = P(None, ("data", "fsdp")) if len(rows) == 4 else P(None)
        assert memory.layers.keys.sharding.is_equivalent_to(NamedSharding(mesh, spread), 6)
    tokens = sharded.generate(found, memory, max_tokens=3, tokens_per_call=4).tokens
    expected = streamer().generate(logits, ragged[2], max_tokens=3, tokens_per_call=4).tokens
    np.testing.assert_array_equal(tokens, expected)


def test_heads_spread_over_a_mesh() -> None:
    """Key heads of the state are on the devices of the parameters' key heads."""
    config = dataclasses.replace(CONFIG, num_kv_heads=2)
    params, prompts = params_of(config), texts(9, 21)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    whole, spread = (
        Streamer(config, params),
        Streamer(config, jax.device_put(params, param_shardings(params, mesh))),
    )
    logits, memory = whole.read(prompts)
    found, spread_memory = spread.read(prompts)
    np.testing.assert_allclose(found, logits, **CLOSE)
    layers = spread_memory.layers
    assert layers.keys.sharding.spec == P(None, ("data", "fsdp"), None, None, "tensor", None)
    assert layers.block_values.sharding.spec == P(None, ("data", "fsdp"), None, "tensor", None)
    assert layers.fam.sharding.is_equivalent_to(NamedSharding(mesh, P(None, ("data", "fsdp"))), 4)
    tokens = spread.generate(found, spread_memory, max_tokens=6).tokens  # beyond the border of a block
    np.testing.assert_array_equal(tokens, whole.generate(logits, memory, max_tokens=6).tokens)


def test_errors(ragged) -> None:
    prompts, logits, memory = ragged
    model = streamer()
    for wrong, message in (
        ([prompts[0], prompts[1], prompts[2][:0]], "prompt 2: is empty; the model needs at least one token"),
        ([np.array([3, 16])], r"prompt 0: token id 16 is outside the model's vocabulary of 16"),
        ([np.array([3, -1])], r"prompt 0: token id -1 is outside"),
        ([prompts[0], np.array([0.5])], "prompt 1: expected a list of token ids, got float64"),
        ([np.zeros((1, 2), int)], "prompt 0: expected a list"),
        ([], "prompts: there are none"),
    ):
        with pytest.raises(UserError, match=message):
            model.read(wrong)
    with pytest.raises(UserError, match="state: holds 3 streams, but there are 2 rows"):
        model.read(prompts[:2], memory)
    with pytest.raises(UserError, match="chunk_blocks: must be at least 1"):
        model.read(prompts, chunk_blocks=0)
    with pytest.raises(UserError, match="max_tokens: must be at least 1"):
        model.generate(logits, memory, max_tokens=0)
    with pytest.raises(UserError, match="key: sampling"):
        model.generate(logits, memory, max_tokens=1, sampling=SAMPLED)
    with pytest.raises(UserError, match="parameters do not fit the model: embedding/table is missing"):
        Streamer(CONFIG, {name: x for name, x in params_of(CONFIG).items() if name != "embedding"})
