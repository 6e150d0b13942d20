"""Compile small programs for TPUs. No TPU needed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.config import MeshConfig
from fam_jax.plan import Module, compile_on, parse, topology_devices
from fam_jax.plan.compile import has_compiler
from fam_jax.sharding import make_mesh

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")

TOPOLOGY = "v5e:2x2"


def mesh(**axes: int) -> Mesh:
    """Return a mesh over the slice, or over its first chip if no axes are given."""
    devices = topology_devices(TOPOLOGY)
    return make_mesh(MeshConfig(**axes), devices if axes else devices[:1])


def compiled(
    function: Callable[..., Any],
    *shapes: tuple[int, ...],
    on: Mesh | None = None,
    spec: P | None = None,
    dtype: Any = jnp.float32,
) -> Module:
    """Return the program of `function` for arrays of these shapes, all sharded by `spec`."""
    on = on or mesh()
    where = NamedSharding(on, spec or P())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes]
    return parse(compile_on(on, function, *arrays).as_text() or "")
