"""Build the programs that `benchmarks.attention` compares.

`python -m benchmarks.attention_programs JSON` compiles one of them.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.splash import SplashTiles, make_splash, static_schedule
from fam_jax.config import MeshConfig
from fam_jax.config.strict_json import dump_json
from fam_jax.kernels import BlockInputs, BlockOptions, block_attention
from fam_jax.plan import Chip, chip_of, compile_on, topology_devices
from fam_jax.sharding import make_mesh, replicated
from fam_jax.training.flops import visible_keys


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one implementation in training, in bfloat16."""

    topology: str
    # pallas, splash or xla
    implementation: str
    # True for forward and backward, False for forward only
    gradient: bool
    # B
    batch: int = 4
    # T
    tokens: int = 8192
    # H
    heads: int = 12
    # K
    kv_heads: int = 12
    # hd
    head_dim: int = 128
    # C
    block_size: int = 1024
    # m
    segments: int = 3
    # S, extra keys of a block
    extra: int = 0
    # Tiles of splash attention
    splash: SplashTiles | None = None

    @property
    def chip(self) -> Chip:
        """The one chip that the call runs on."""
        return chip_of(self.topology)

    def reduced(self) -> "Case":
        """Return the case with the fewest rows and heads that keep every core busy.

        The time of a kernel is linear in both, so the profile of this case is enough.
        """
        cores = self.chip.cores
        group = self.heads // self.kv_heads
        kv_heads = min(self.kv_heads, cores)
        return dataclasses.replace(self, batch=cores, heads=kv_heads * min(group, 4), kv_heads=kv_heads)

    def scores(self, *, whole_tiles: bool) -> float:
        """Return the number of visible scores. With `whole_tiles`, add the masked half of each block's own square."""
        size = self.block_size
        keys = visible_keys(self.tokens, block_size=size, segments=self.segments, extra=lambda _: self.extra)
        if whole_tiles:
            keys += self.tokens * (size - 1) / 2
        return self.batch * self.heads * keys

    def macs(self, *, whole_tiles: bool = False) -> float:
        """Return the multiply-adds that every implementation needs: 2 products per score forward, 5 backward."""
        return (7 if self.gradient else 2) * self.head_dim * self.scores(whole_tiles=whole_tiles)


def build(case: Case) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct], Any]:
    """Return the function, its arguments without shardings, and the context to trace it in for a profile."""
    batch, tokens, dim = case.batch, case.tokens, case.head_dim

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    context: Any = contextlib.nullcontext()
    if case.implementation == "splash":
        assert case.splash is not None and case.kv_heads in (1, case.heads)
        mqa = case.kv_heads < case.heads
        attend, kernel = make_splash(tokens, case.heads, case.block_size, case.segments, case.splash, mqa=mqa)
        context = static_schedule(kernel)
        q = array(batch, case.heads, tokens, dim)
        inputs = [q, *[array(batch, tokens, dim) if mqa else q] * 2]
    else:
        blocks = tokens // case.block_size
        # The kernels read heads side by side, so reshaping such an array costs nothing.
        flat = case.implementation == "pallas"

        def side_by_side(*shape: int) -> jax.ShapeDtypeStruct:
            return array(*shape[:-2], shape[-2] * shape[-1]) if flat else array(*shape)

        q = side_by_side(batch, tokens, case.heads, dim)
        k = side_by_side(batch, tokens, case.kv_heads, dim)
        inputs = [q, k, k, *[side_by_side(batch, blocks, case.extra, case.kv_heads, dim)] * 2]

        def attend(*inputs: jax.Array) -> jax.Array:
            q, k, v, extra_k, extra_v = (
                x.reshape(*x.shape[:-1], x.shape[-1] // dim, dim) if flat else x for x in inputs
            )
            options = BlockOptions(case.block_size, case.segments)
            arrays = BlockInputs(q, k, v, extra_k, extra_v)
            out = block_attention(arrays, options, implementation=case.implementation)
            return out.reshape(inputs[0].shape)

    if not case.gradient:
        return attend, inputs, context

    def both(d_out: jax.Array, *inputs: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, *inputs)
        return out, pullback(d_out)

    return both, [q, *inputs], context


def compile_case(case: Case, *, static: bool = False) -> jax.stages.Compiled:
    """Compile for one chip. For a profile, `static` turns a schedule that is stored as data into predicates."""
    mesh = make_mesh(MeshConfig(), topology_devices(case.topology)[:1])
    function, arguments, context = build(case)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)) for x in arguments]
    with context if static else contextlib.nullcontext():
        return compile_on(mesh, function, *placed)


def to_json(case: Case) -> str:
    """Return a case as JSON text, for the command line."""
    return dump_json(dataclasses.asdict(case))


def from_json(text: str) -> Case:
    """Return the case of a JSON text; the inverse of :func:`to_json`."""
    values = json.loads(text)
    if values["splash"] is not None:
        values["splash"] = SplashTiles(**values["splash"])
    return Case(**values)


if __name__ == "__main__":
    compile_case(from_json(sys.argv[1]), static=True)
