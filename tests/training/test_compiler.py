"""Compiler options of the train step: for several TPUs only, and within the fast memory of the chip."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fam_jax.kernels.pallas.tiles import VMEM_MIB
from fam_jax.training.compiler import VMEM_LIMIT, compiler_options


def mesh(platform: str, kind: str, count: int) -> Any:
    devices = np.array([SimpleNamespace(platform=platform, device_kind=kind)] * count)
    return SimpleNamespace(devices=devices, size=count)


@pytest.mark.parametrize(("platform", "count"), [("cpu", 8), ("gpu", 8), ("tpu", 1)])
def test_other_devices_and_a_single_one_have_none(platform: str, count: int) -> None:
    assert compiler_options(mesh(platform, "TPU v5p", count)) is None


@pytest.mark.parametrize("kind", [*VMEM_MIB, "TPU of the future"])
def test_the_limit_leaves_half_of_the_fast_memory(kind: str) -> None:
    options = compiler_options(mesh("tpu", kind, 4))
    assert options is not None
    limit = int(options.get(VMEM_LIMIT, 0)) / 1024
    assert limit <= VMEM_MIB.get(kind, 16) / 2
    assert (limit == 32) == (VMEM_MIB.get(kind, 16) >= 64)
