"""Block attention with the Pallas TPU kernels: what they can compute, which of them run, and the derivative."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.config import UserError, ceil_div
from fam_jax.kernels.arguments import BlockInputs, BlockOptions, fill_counts
from fam_jax.kernels.pallas import resident, resident_backward, streamed, streamed_backward
from fam_jax.kernels.pallas.blocks import KV
from fam_jax.kernels.pallas.call import KernelCall, Results, Views
from fam_jax.kernels.pallas.devices import CORES, division, over_mesh, target_chip
from fam_jax.kernels.pallas.geometry import Geometry
from fam_jax.kernels.pallas.streamed import Counts
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES, Tiles, choose_tiles


class AttentionError(UserError, ValueError):
    """The requested implementation of attention cannot run here."""


def why_not_pallas(q: jax.Array, options: BlockOptions) -> str:
    """Return why the kernels cannot compute attention of q (B, T, H, hd) on a TPU, or an empty string if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels take bfloat16 and float32, but the queries are {q.dtype}"
    if options.block_size % LANES:
        return f"the block size must be a multiple of {LANES}, but it is {options.block_size}"
    if options.softcap:
        return "the kernels do not support a soft cap of scores"
    if q.shape[-1] % 8:
        return f"the head dimension must be a multiple of 8, but it is {q.shape[-1]}"
    return ""


def pallas_block_attention(
    inputs: BlockInputs,
    options: BlockOptions,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Compute :func:`fam_jax.kernels.block_attention` with the kernels.

    Args:
      inputs: arrays of the call.
      options: options of the call.
      interpret: run in Pallas' TPU interpreter, on any machine. It is slow and meant for tests.
      tiles: sizes of tiles; None chooses them for the chip.

    Raises:
      AttentionError: the kernels do not support the inputs, or the program is not compiled for a TPU.
    """
    chip = "interpreter" if interpret else target_chip()
    reason = why_not_pallas(inputs.q, options)
    if reason:
        raise AttentionError(f"attention implementation pallas: {reason}; use implementation xla")
    if not chip:
        raise AttentionError(
            "attention implementation pallas: the kernels need a TPU, and there is none; use xla, or pallas_interpret "
            "to run them in an interpreter"
        )
    attend = functools.partial(
        _attend_on_device,
        options=options,
        chip=chip,
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        tiles=tiles,
    )
    rows, heads, kv_heads = division(inputs.q.shape[0], inputs.q.shape[2], inputs.k.shape[2])
    queries, keys, extra = P(rows, None, heads), P(rows, None, kv_heads), P(rows, None, None, kv_heads)
    specs = BlockInputs._make([queries, keys, keys, extra, extra, keys, P(rows), P(rows)])
    return over_mesh(attend, inputs, specs, queries)


def _attend_on_device(
    inputs: BlockInputs, *, options: BlockOptions, chip: str, interpret: Any, tiles: Tiles | None
) -> jax.Array:
    """Compute attention of the rows and heads of one device."""
    inputs = _for_cores(inputs, chip)
    length = inputs.q.shape[1]
    past = options.memory_segments * options.block_size
    static = inputs.past_slots in (0, past) and inputs.extra_count is None
    geometry = _geometry(inputs, options, static)
    tiles = tiles or choose_tiles(chip, geometry, inputs.q.dtype, static)
    tiles.check(geometry.block_size)
    # The resident kernels skip the missing part of the last block, in whole tiles; the others need whole blocks.
    unit = tiles.rows if tiles.resident_forward and tiles.resident_backward else geometry.block_size
    padded = ceil_div(length, unit) * unit
    geometry = dataclasses.replace(geometry, missing=geometry.blocks * geometry.block_size - padded)
    inputs = _pad(fill_counts(inputs), padded - length, geometry.extra_slots - geometry.extra_keys)
    return _attend(KernelCall(geometry, tiles, interpret), inputs)[:, :length]


def _for_cores(inputs: BlockInputs, chip: str) -> BlockInputs:
    """Return inputs that two cores can divide.

    The cores divide rows and key heads. If their product is odd, each key head is repeated, and each copy serves half
    of the query heads.
    """
    heads, kv_heads = inputs.q.shape[2], inputs.k.shape[2]
    odd = inputs.q.shape[0] * kv_heads % 2 == 1
    if CORES.get(chip, 1) != 2 or not odd or heads // kv_heads % 2:
        return inputs
    names = ("k", "v", "extra_k", "extra_v", "past")
    twice = functools.partial(jnp.repeat, repeats=2, axis=-2)
    return inputs._replace(**{name: jax.tree.map(twice, getattr(inputs, name)) for name in names})


def _geometry(inputs: BlockInputs, options: BlockOptions, static: bool) -> Geometry:
    blocks, extra_keys = inputs.extra_k.shape[1:3]
    cached = inputs.past_slots // options.block_size if static else 0
    return Geometry(
        block_size=options.block_size,
        blocks=blocks,
        segments=min(options.memory_segments, blocks - 1)
        if static and not cached
        else options.memory_segments,
        cached=cached,
        window=options.window,
        extra_slots=ceil_div(extra_keys, SUBLANES) * SUBLANES,
        extra_keys=extra_keys,
        heads=inputs.q.shape[2],
        kv_heads=inputs.k.shape[2],
        head_dim=inputs.q.shape[3],
        stop_gradient=options.stop_gradient,
    )


def _pad(inputs: BlockInputs, tokens: int, extra: int) -> BlockInputs:
    """Return inputs padded with `tokens` more tokens at the end and `extra` more extra keys per block."""
    q, k, v = (jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0))) for x in inputs[:3])
    extra_k, extra_v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))) for x in inputs[3:5])
    return inputs._replace(q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: KernelCall, inputs: BlockInputs) -> jax.Array:
    return call.layout.unview(_results(call, inputs).out)


def _forward(call: KernelCall, primals: BlockInputs) -> tuple[jax.Array, Any]:
    """Compute attention of padded inputs; also return the residuals of its derivative.

    Args:
      call: static settings.
      primals: the inputs. Each array is a `CustomVJPPrimal`, which says whether anybody asks for its gradient.
    """
    inputs: BlockInputs = jax.tree.map(lambda x: x.value, primals)
    wanted = any(x.perturbed for x in jax.tree.leaves(primals.past)) and not call.geometry.stop_gradient
    call = dataclasses.replace(call, geometry=dataclasses.replace(call.geometry, past_gradient=wanted))
    results = _results(call, inputs)
    return call.layout.unview(results.out), (call, inputs, results)


def _results(call: KernelCall, inputs: BlockInputs) -> Results:
    views, counts = _views(call, inputs), Counts(inputs.past_length, inputs.extra_count)
    if call.tiles.resident_forward:
        results = resident.forward(call, inputs.past_length, views)
    else:
        results = streamed.forward(call, counts, _with_past(call, views))
    # Rematerialization policies keep results by name. Without the name the kernel would run twice.
    return Results(*(checkpoint_name(x, "block_attention") for x in results))


def _backward(_: KernelCall, residuals: Any, d_out: Any) -> tuple[BlockInputs]:
    call, inputs, results = residuals
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    views, counts = _views(call, inputs), Counts(inputs.past_length, inputs.extra_count)
    d_view = call.layout.view(d_out)
    if call.tiles.resident_backward:
        gradients = resident_backward.backward(call, inputs.past_length, views, results, d_view)
    else:
        joined = streamed_backward.backward(call, counts, _with_past(call, views), results, d_view)
        gradients = _without_past(call, joined, inputs.past_slots)
    unview = call.layout.unview
    d_tokens = KV(*map(unview, gradients.tokens))
    extra = KV(inputs.extra_k, inputs.extra_v)
    if gradients.extra:
        pairs = zip(gradients.extra, extra, strict=True)
        d_extra = KV(*(unview(x).reshape(like.shape) for x, like in pairs))
    else:
        d_extra = jax.tree.map(jnp.zeros_like, extra)
    # None stands for zeros, also where the inputs have arrays.
    d_past = KV(*map(unview, gradients.past)) if gradients.past else None
    return (BlockInputs(unview(gradients.q), d_tokens.k, d_tokens.v, d_extra.k, d_extra.v, d_past),)


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _views(call: KernelCall, inputs: BlockInputs) -> Views:
    """Return the inputs in the layout of the kernels."""
    view = call.layout.view

    def flat(x: jax.Array) -> jax.Array:
        return view(x.reshape(x.shape[0], -1, *x.shape[3:]))

    extra = KV(flat(inputs.extra_k), flat(inputs.extra_v)) if call.geometry.extra_slots else None
    past = KV(*map(view, inputs.past)) if inputs.past else None
    return Views(view(inputs.q), KV(view(inputs.k), view(inputs.v)), extra, past)


def _with_past(call: KernelCall, views: Views) -> Views:
    """Return views whose keys and values start with all m * C past slots, as the streamed kernels read them."""
    geometry, axis = call.geometry, call.layout.token_axis
    tokens = views.tokens
    if views.past:
        pairs = zip(views.past, tokens, strict=True)
        tokens = KV(*(jnp.concatenate(pair, axis=axis) for pair in pairs))
    missing = (geometry.segments + geometry.blocks) * geometry.block_size - tokens.k.shape[axis]
    head = [(missing, 0) if i == axis else (0, 0) for i in range(views.q.ndim)]
    return views._replace(tokens=KV(*(jnp.pad(x, head) for x in tokens)), past=None)


def _without_past(call: KernelCall, gradients: Views, past_slots: int) -> Views:
    """Return gradients of :func:`_with_past` as those of the views that it got, with so many past slots."""
    geometry, axis = call.geometry, call.layout.token_axis
    own = geometry.segments * geometry.block_size

    def part(begin: int, end: int) -> KV:
        return KV(*(jax.lax.slice_in_dim(x, begin, end, axis=axis) for x in gradients.tokens))

    past = part(own - past_slots, own) if past_slots else None
    return gradients._replace(tokens=part(own, own + geometry.tokens), past=past)
