"""Compile attention and its gradients for a TPU, and print the names of the kernels. No TPU needed.

`test_tpu_compiler` runs this module in a new process.
"""

import json
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fam_jax.config import MeshConfig
from fam_jax.kernels import (
    KV,
    BlockInputs,
    BlockOptions,
    UpdateInputs,
    block_attention,
    rotary,
    update_attention,
)
from fam_jax.plan import topology_devices
from fam_jax.sharding import make_mesh, traced_for

# (B, H, K, hd, C, T / C, m, S, P / C, dtype). Calls use the resident kernels where these fit, but not prefill, which
# passes the number of existing extra keys.
SHAPES = {
    "training": (1, 2, 2, 128, 256, 4, 2, 16, 0, jnp.bfloat16),
    "training, multi-query": (1, 2, 1, 128, 256, 4, 2, 16, 0, jnp.bfloat16),
    "training, 64 wide heads, float32": (1, 2, 1, 64, 128, 4, 1, 8, 0, jnp.float32),
    "training, no extra keys": (1, 2, 2, 256, 128, 2, 1, 0, 0, jnp.bfloat16),
    "training, half of the last block": (1, 2, 1, 128, 512, 2.5, 2, 16, 0, jnp.bfloat16),
    "training, continued": (2, 2, 1, 128, 256, 4, 2, 16, 2, jnp.bfloat16),
    "training, continued, shorter than the past": (2, 2, 1, 64, 128, 1.5, 3, 0, 3, jnp.float32),
    "prefill": (2, 2, 1, 128, 256, 2, 2, 64, 2, jnp.bfloat16),
    "prefill, 64 wide heads, float32": (1, 2, 2, 64, 128, 2, 1, 8, 1, jnp.float32),
    "prefill, long memory": (1, 2, 1, 128, 1024, 1, 12, 256, 12, jnp.bfloat16),
    "paper": (1, 2, 2, 128, 1024, 8, 3, 64, 0, jnp.bfloat16),
    "paper, prefill": (1, 2, 2, 128, 1024, 2, 3, 64, 3, jnp.bfloat16),
}


def compile_shape(topology: str, name: str, fsdp: int = 1, tensor: int = 1, **options: Any) -> set[str]:
    """Return the names of the attention kernels in the executable, for a mesh of fsdp * tensor chips."""
    batch, heads, kv_heads, head_dim, size, length, segments, extra, past, dtype = SHAPES[name]
    blocks = math.ceil(length)
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), topology_devices(topology)[: fsdp * tensor])

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    tokens = int(length * size)
    inputs = (
        array(batch, tokens, heads, head_dim),
        *[array(batch, tokens, kv_heads, head_dim)] * 2,
        *[array(batch, blocks, extra, kv_heads, head_dim)] * 2,
        KV(*[array(batch, past * size, kv_heads, head_dim)] * 2) if past else None,
    )
    past_length = array(batch, dtype=jnp.int32) if past else None
    counts = (past_length, array(batch, blocks, dtype=jnp.int32) if "prefill" in name else None)

    def attention_and_gradients(inputs: Any, counts: Any, cotangent: jax.Array) -> Any:
        def attend(*inputs: Any) -> jax.Array:
            return block_attention(
                BlockInputs(*inputs, *counts),
                BlockOptions(block_size=size, memory_segments=segments, **options),
                implementation="pallas",
            )

        out, pull = jax.vjp(attend, *inputs)
        return out, pull(cotangent)

    traced = jax.jit(traced_for(mesh, attention_and_gradients)).trace(inputs, counts, inputs[0])
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    return set(re.findall(r"block_attention_[a-z_]*[a-z]", text))


def compile_small(topology: str) -> set[str]:
    """Return the names of the kernels of rotary embedding, update attention and its gradients."""
    mesh = make_mesh(MeshConfig(), topology_devices(topology)[:1])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def update_and_gradients(q: Any, own: Any, tokens: Any, tap: Any, cos: Any, sin: Any) -> Any:
        def attend(q: Any, own: Any, tap: Any) -> jax.Array:
            q = rotary(q, cos, sin, implementation="pallas")
            inputs = UpdateInputs(q, KV(own, own), KV(tokens, tokens), jnp.int32(1), KV(tap, tap))
            return update_attention(inputs, implementation="pallas")

        out, pull = jax.vjp(attend, q, own, tap)
        return out, pull(out)

    shapes = (array(2, 32, 4, 128), array(2, 32, 2, 128), array(2, 640, 256), array(2, 256, 256))
    angles = (array(1, 32, 1, 64, dtype=jnp.float32),) * 2
    traced = jax.jit(traced_for(mesh, update_and_gradients)).trace(*shapes, *angles)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    return set(re.findall(r"(?:rotary_embedding|update_attention_forward|update_attention_backward)", text))


def main(topology: str, *names: str) -> None:
    """Compile the named shapes, some also with window and stop-gradient; "small" names the other kernels."""
    for name in names:
        if name == "small":
            print(json.dumps([name, sorted(compile_small(topology))]), flush=True)
            continue
        variants: list[dict[str, Any]] = [{}]
        if name in ("training", "training, continued", "prefill"):
            variants.append({"window": SHAPES[name][6] * SHAPES[name][4], "stop_gradient": True})
        for options in variants:
            print(json.dumps([name, sorted(compile_shape(topology, name, **options))]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
