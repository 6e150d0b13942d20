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
    ("spellings", "name"),
    [
        (
            ("v5e-16", "v5litepod-16", "v5lite-16", "V5E:4x4", "v5litepod:4x4", "v5e-4x4", " v5e:4x4 "),
            "v5e:4x4",
        ),
        (("v6e-8", "v6e-2X4"), "v6e:2x4"),
        (("v5p-8", "v5p-2x2x1"), "v5p:2x2x1"),
        (("v5p-256", "V5P-256"), "v5p:4x4x8"),
        (("v4-32", "v4-2x2x4"), "v4:2x2x4"),
        (("v5p-4x4x16",), "v5p:4x4x16"),
    ],
)
def test_other_spellings_of_a_slice(spellings: tuple[str, ...], name: str) -> None:
    for spelling in spellings:
        assert parse_slice(spelling) == parse_slice(name), spelling
    assert parse_slice(parse_slice(name).accelerator_type or name) == parse_slice(name)


@pytest.mark.parametrize(
    ("topology", "vcpus", "memory"),
    [
        ("v5e:1x1", 24, 48),
        ("v5e:4x4", 112, 192),
        ("v5e:2x4", 224, 384),
        ("v5p:4x4x4", 208, 448),
        ("v4:2x2x2", 240, 407),
    ],
)
def test_what_a_host_has(topology: str, vcpus: int, memory: int) -> None:
    """https://cloud.google.com/tpu/docs/v5e and /v5p, "VM types"."""
    found = parse_slice(topology)
    assert (found.vcpus, found.memory_gb) == (vcpus, memory)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "v5q:2x2",
            "slice 'v5q:2x2': expected GENERATION:TOPOLOGY, such as v5p:4x4x8, or an accelerator type, such as "
            "v5litepod-16; generations are v4, v5e, v5p, v6e",
        ),
        ("v5p", "slice 'v5p': there is no such accelerator type; v5p has v5p-8, v5p-16, "),
        ("v5e-12", "slice 'v5e-12': there is no such accelerator type; v5e has v5litepod-1, v5litepod-4, "),
        ("v5p-9", "slice 'v5p-9': there is no such accelerator type; v5p has v5p-8, "),
        ("v5e:16", "slice 'v5e:16': v5e has the topologies 1x1, 2x2, "),
        ("v5p:04x4x8", "slice 'v5p:04x4x8': v5p has the topologies "),
        (
            "v5p:4x4x\N{FULLWIDTH DIGIT FOUR}",
            "slice 'v5p:4x4x\N{FULLWIDTH DIGIT FOUR}': v5p has the topologies ",
        ),
        ("v5p:4x4x-4", "slice 'v5p:4x4x-4': v5p has the topologies "),
        (
            "tpu7x:2x2x1",
            "slice 'tpu7x:2x2x1': TPU7x is not supported; use one of the generations v4, v5e, v5p, v6e",
        ),
        ("TPU7x-8", "slice 'TPU7x-8': TPU7x is not supported"),
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
