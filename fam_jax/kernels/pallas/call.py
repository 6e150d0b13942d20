"""Block attention by the Pallas TPU kernels: what can run, which kernels take it, and its derivative."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.config import UserError
from fam_jax.kernels.pallas import resident, resident_backward, streamed, streamed_backward
from fam_jax.kernels.pallas.geometry import Geometry, Layout
from fam_jax.kernels.pallas.partition import division, over_mesh
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES, Tiles, choose_tiles
from fam_jax.kernels.platform import target_chip
from fam_jax.kernels.shapes import BlockShape

CORES = dict.fromkeys(("TPU v4", "TPU v5", "TPU v5p"), 2)  # that one kernel runs on; 1 elsewhere


class AttentionError(UserError, ValueError):
    """An implementation of attention was asked for by name and cannot run here."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about a call; the non-differentiable argument of its derivative."""

    geometry: Geometry
    sizes: Tiles
    interpret: Any


def why_not_pallas(q: jax.Array, shape: BlockShape) -> str:
    """Why the kernels cannot compute attention of `q` (B, T, H, hd); empty if they can, on a TPU."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels take bfloat16 and float32, and the queries are {q.dtype}"
    if shape.block_size % LANES:
        return f"its kernels need a block size that is a multiple of {LANES}, and it is {shape.block_size}"
    if shape.softcap:
        return "its kernels have no soft cap of scores"
    if q.shape[-1] % 8:
        return f"its kernels need a head dimension that is a multiple of 8, and it is {q.shape[-1]}"
    return ""


def pallas_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    shape: BlockShape,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    sizes: Tiles | None = None,
) -> jax.Array:
    """See :func:`fam_jax.kernels.block_attention`; arguments as there, and two more.

    With `interpret` it runs in Pallas' TPU interpreter, on any machine: slow, for tests. `sizes` are the tiles; None is
    the choice for the chip at hand.

    Raises:
      AttentionError: the kernels do not take such shapes, or the program is not being compiled for a TPU.
    """
    chip = "interpreter" if interpret else target_chip()
    reason = why_not_pallas(q, shape)
    if not reason and not chip:
        reason = "its kernels run on TPUs, and there is none (pallas_interpret runs them in an interpreter)"
    if reason:
        raise AttentionError(f"attention implementation pallas: {reason}")

    attend = functools.partial(_attend_here, shape=shape, chip=chip, interpret=interpret, sizes=sizes)
    rows, heads, kv_heads = division(q.shape[0], q.shape[2], k.shape[2])
    tokens, keys, fam = P(rows, None, heads), P(rows, None, kv_heads), P(rows, None, None, kv_heads)
    arrays = (q, k, v, fam_k, fam_v, past_length, fam_count)
    return over_mesh(attend, arrays, (tokens, keys, keys, fam, fam, P(rows), P(rows)), tokens)


def _attend_here(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    *,
    shape: BlockShape,
    chip: str,
    interpret: bool | pltpu.InterpretParams,
    sizes: Tiles | None,
) -> jax.Array:
    """The rows and heads of one device."""
    if CORES.get(chip, 1) == 2 and (q.shape[0] * k.shape[2]) % 2 and (q.shape[2] // k.shape[2]) % 2 == 0:
        # The cores divide rows and key heads among them: of an odd number one is taken for two, with half its queries.
        k, v, fam_k, fam_v = (jnp.repeat(x, 2, axis=-2) for x in (k, v, fam_k, fam_v))
    length, slots, size = q.shape[1], k.shape[1] - q.shape[1], shape.block_size
    blocks, fam_keys = fam_k.shape[1], fam_k.shape[2]
    static = slots == 0 and fam_count is None
    geometry = Geometry(
        block_size=size,
        blocks=blocks,
        segments=min(shape.memory_segments, blocks - 1) if static else shape.memory_segments,
        window=shape.window,
        fam_slots=-(-fam_keys // SUBLANES) * SUBLANES,  # whole tiles of fast memory
        fam_keys=fam_keys,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        stop_gradient=shape.stop_gradient,
    )
    sizes = sizes or choose_tiles(chip, geometry, q.dtype, static)
    sizes.check(size)
    # The last block may not be full. The resident kernels leave what is missing alone, in whole tiles.
    unit = sizes.rows if sizes.resident_forward and sizes.resident_backward else size
    padded = -(-length // unit) * unit
    geometry = dataclasses.replace(geometry, missing=blocks * size - padded)
    call = _Call(geometry, sizes, pltpu.InterpretParams() if interpret is True else interpret)

    tail = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, tail) for x in (q, k, v))
    fam_tail = ((0, 0), (0, 0), (0, geometry.fam_slots - fam_keys), (0, 0), (0, 0))
    fam_k, fam_v = (jnp.pad(x, fam_tail) for x in (fam_k, fam_v))
    if past_length is None:
        past_length = jnp.full(q.shape[0], slots, jnp.int32)
    if fam_count is None:
        fam_count = jnp.full((q.shape[0], blocks), fam_keys, jnp.int32)
    return _attend(call, q, k, v, fam_k, fam_v, past_length, fam_count)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, *arrays: jax.Array) -> jax.Array:
    return _forward(call, *arrays)[0]


def _forward(call: _Call, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    """q, k, v, fam_k, fam_v, past_length, fam_count; whole blocks of queries, padded feedback keys."""
    geometry, layout = call.geometry, Layout(call.geometry.head_dim)
    views, (past_length, fam_count) = _views(arrays[:5], geometry), arrays[5:]
    if call.sizes.resident_forward:
        out, logsum = resident.forward(views, geometry, call.sizes, call.interpret)
    else:
        padded, past_length = _with_past(views, past_length, geometry)
        out, logsum = streamed.forward(padded, past_length, fam_count, geometry, call.sizes, call.interpret)
    out, logsum = (checkpoint_name(x, "block_attention") for x in (out, logsum))
    return layout.unview(out), (arrays, out, logsum)


def _backward(call: _Call, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    arrays, out, logsum = residuals
    geometry, layout = call.geometry, Layout(call.geometry.head_dim)
    views, (past_length, fam_count) = _views(arrays[:5], geometry), arrays[5:]
    d_view = layout.view(d_out)
    if call.sizes.resident_backward:
        gradients = resident_backward.backward(
            views, out, logsum, d_view, geometry, call.sizes, call.interpret
        )
    else:
        padded, past_length = _with_past(views, past_length, geometry)
        gradients = streamed_backward.backward(
            padded, past_length, fam_count, out, logsum, d_view, geometry, call.sizes, call.interpret
        )
    dq, dk, dv, *d_fam = (layout.unview(x) for x in gradients)
    length = arrays[1].shape[1]
    tokens = (dq, dk[:, -length:], dv[:, -length:])
    fams = (x.reshape(arrays[3].shape) for x in d_fam) if d_fam else (jnp.zeros_like(x) for x in arrays[3:5])
    return (*tokens, *fams, *(np.zeros(x.shape, jax.dtypes.float0) for x in arrays[5:]))


_attend.defvjp(_forward, _backward)


def _views(arrays: tuple[jax.Array, ...], geometry: Geometry) -> tuple[jax.Array, ...]:
    """q, k, v and, if there are any, the feedback keys and values, as the kernels take them."""
    layout, (q, k, v, fam_k, fam_v) = Layout(geometry.head_dim), arrays
    fams = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (fam_k, fam_v)] if geometry.fam_slots else []
    return tuple(layout.view(x) for x in (q, k, v, *fams))


def _with_past(
    views: tuple[jax.Array, ...], past_length: jax.Array, geometry: Geometry
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Keys and values with all m * C past slots, which the streamed kernels want."""
    layout = Layout(geometry.head_dim)
    axis = 1 if layout.flat else 2
    missing = (geometry.segments + geometry.blocks) * geometry.block_size - views[1].shape[axis]
    if not missing:
        return views, past_length
    head = [(missing, 0) if i == axis else (0, 0) for i in range(views[1].ndim)]
    q, k, v, *fams = views
    return (q, jnp.pad(k, head), jnp.pad(v, head), *fams), past_length
