"""Names of slices, checked against the tables of Google Cloud's documentation."""

import json

import pytest

from fam_jax.config import UserError
from launch.tpu import slices
from launch.tpu.slices import parse_slice

# https://cloud.google.com/tpu/docs/v5p, "Configurations": topology, cores, chips, hosts.
V5P = """
2x2x1 8 4 1
2x2x2 16 8 2
2x4x4 64 32 8
4x4x4 128 64 16
4x4x8 256 128 32
4x8x8 512 256 64
8x8x8 1024 512 128
8x8x16 2048 1024 256
8x16x16 4096 2048 512
16x16x16 8192 4096 1024
16x16x24 12288 6144 1536
"""
# https://cloud.google.com/tpu/docs/v6e, "Supported configurations": topology, chips, VMs, chips per VM.
V6E = """
1x1 1 1 1
2x2 4 1 4
2x4 8 1 8
4x4 16 4 4
4x8 32 8 4
8x8 64 16 4
8x16 128 32 4
16x16 256 64 4
"""


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


@pytest.mark.parametrize(("topology", "cores", "chips", "hosts"), rows(V5P))
def test_v5p(topology: str, cores: str, chips: str, hosts: str) -> None:
    found = parse_slice(f"v5p:{topology}")
    assert found.accelerator_type == f"v5p-{cores}"
    assert (found.chips, found.hosts, found.chips_per_host) == (int(chips), int(hosts), 4)
    assert found.machine_type == "ct5p-hightpu-4t"
    assert parse_slice(f"v4:{topology}").accelerator_type == f"v4-{cores}"


@pytest.mark.parametrize(("topology", "chips", "hosts", "per_host"), rows(V6E))
def test_v6e_and_v5e(topology: str, chips: str, hosts: str, per_host: str) -> None:
    for generation, accelerator, machine in (
        ("v6e", f"v6e-{chips}", f"ct6e-standard-{per_host}t"),
        ("v5e", f"v5litepod-{chips}", f"ct5lp-hightpu-{per_host}t"),
    ):
        found = parse_slice(f"{generation}:{topology}")
        assert (found.accelerator_type, found.machine_type) == (accelerator, machine)
        assert (found.chips, found.hosts, found.chips_per_host) == (int(chips), int(hosts), int(per_host))


def test_a_slice_without_an_accelerator_type_is_requested_by_its_topology() -> None:
    """v5p-512 is 4x8x8."""
    assert parse_slice("v5p:4x4x16").request == ["--type=v5p", "--topology=4x4x16"]
    assert parse_slice("v5p:4x8x8").request == ["--accelerator-type=v5p-512"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "v5q:2x2",
            "slice 'v5q:2x2': expected GENERATION:TOPOLOGY, such as v5p:4x4x8; generations are v4, v5e, v5p, v6e",
        ),
        ("v5p", "slice 'v5p': v5p has the topologies 2x2x1, "),
        ("v5p:8x4x4", "slice 'v5p:8x4x4': "),
        ("v5p:4x4x6", "slice 'v5p:4x4x6': "),
        ("v5p:0x0x0", "slice 'v5p:0x0x0': "),
        ("v5e:4x4x4", "slice 'v5e:4x4x4': v5e has the topologies 1x1, 2x2, "),
    ],
)
def test_other_slices_are_rejected(name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_slice(name)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert slices.main(["v5e:4x8"]) == 0
    assert json.loads(capsys.readouterr().out)["hosts"] == 8
    assert slices.main(["v5p:4x4x16", "request"]) == 0
    assert capsys.readouterr().out == "--type=v5p --topology=4x4x16\n"
    with pytest.raises(UserError, match="hots: no such name; a slice has generation, "):
        slices.main(["v5e:4x8", "hots"])
