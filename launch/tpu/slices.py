"""Translate the name of a TPU slice into the names that each of Google Cloud's interfaces has for it.

    python -m launch.tpu.slices v5p:4x4x8
    python -m launch.tpu.slices v5p:4x4x8 accelerator_type

A slice is written GENERATION:TOPOLOGY, with the topology in chips, such as v5p:4x4x8, or as Google Cloud's accelerator
type, such as v5p-256 or v5litepod-16. Sources, read in November 2026:
https://cloud.google.com/tpu/docs/v4, /v5p, /v5e and /v6e (shapes, hosts, what an accelerator type counts),
https://cloud.google.com/tpu/docs/runtimes (software of TPU VMs),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels of nodes, machine types).
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json

from .. import cli


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the slices of a TPU generation have in common."""

    # Prefix of its accelerator types, which end in a count.
    accelerator_type: str
    # Other prefixes in use.
    spellings: tuple[str, ...]
    # Whether the count is of cores, two per chip, rather than of chips.
    counts_cores: bool
    # Number of dimensions of its topologies.
    dimensions: int
    # Software of its TPU VMs.
    runtime_version: str
    # Value of the label cloud.google.com/gke-tpu-accelerator of its nodes.
    gke_accelerator: str
    # Prefix of its machine types, which end in the number of chips of a node.
    machine_type: str
    # Chips of a machine -> its virtual CPUs and its memory in GB.
    machines: dict[int, tuple[int, int]]


GENERATIONS = {
    "v4": Generation(
        "v4-", (), True, 3, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-", {4: (240, 407)}
    ),
    "v5e": Generation(
        "v5litepod-",
        ("v5lite", "v5litepod"),
        False,
        2,
        "v2-alpha-tpuv5-lite",
        "tpu-v5-lite-podslice",
        "ct5lp-hightpu-",
        {1: (24, 48), 4: (112, 192), 8: (224, 384)},
    ),
    "v5p": Generation(
        "v5p-", (), True, 3, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-", {4: (208, 448)}
    ),
    "v6e": Generation(
        "v6e-",
        (),
        False,
        2,
        "v2-alpha-tpuv6e",
        "tpu-v6e-slice",
        "ct6e-standard-",
        {1: (44, 176), 4: (180, 720), 8: (180, 1440)},
    ),
}
SPELLINGS = {spelling: name for name, facts in GENERATIONS.items() for spelling in (name, *facts.spellings)}
# Each of its chips is two devices for JAX, and it has no queued resources.
UNSUPPORTED = ("tpu7x", "tpu7", "v7x", "ironwood")

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Topologies smaller than a cube of 4x4x4; larger ones consist of whole cubes.
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Several topologies may have the same number of chips. An accelerator type stands for the one in the documentation's
# tables.
USUAL = (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips, with one VM and one process of a job per host."""

    generation: str
    topology: str
    chips: int
    hosts: int
    chips_per_host: int
    # Empty if no type stands for this topology.
    accelerator_type: str
    runtime_version: str
    gke_accelerator: str
    machine_type: str
    # Of a host: virtual CPUs, and memory in GB.
    vcpus: int
    memory_gb: int

    @property
    def request(self) -> list[str]:
        """Return the flags with which gcloud requests the slice."""
        if self.accelerator_type:
            return [f"--accelerator-type={self.accelerator_type}"]
        return [f"--type={self.generation}", f"--topology={self.topology}"]


def parse_slice(name: str) -> Slice:
    """Return the slice with a name such as `v5p:4x4x8`, `v5p-256` or `v5litepod-16`.

    Raises:
      UserError: there is no such generation, or it has no such topology.
    """
    text = name.strip().lower()
    border = ":" if ":" in text else "-"
    spelled, _, shape = text.partition(border)
    if spelled in UNSUPPORTED:
        raise UserError(
            f"slice {name!r}: TPU7x is not supported; use one of the generations {', '.join(GENERATIONS)}"
        )
    if spelled not in SPELLINGS:
        raise UserError(
            f"slice {name!r}: expected GENERATION:TOPOLOGY, such as v5p:4x4x8, or an accelerator type, such as "
            f"v5litepod-16; generations are {', '.join(GENERATIONS)}"
        )
    generation = SPELLINGS[spelled]
    facts = GENERATIONS[generation]
    by_type = {_accelerator_type(facts, usual).rpartition("-")[2]: usual for usual in _usual(facts)}
    counts = border == "-" and "x" not in shape
    if counts and shape not in by_type:
        raise UserError(
            f"slice {name!r}: there is no such accelerator type; {generation} has "
            f"{', '.join(f'{facts.accelerator_type}{count}' for count in by_type)}"
        )
    topology = by_type[shape] if counts else shape
    _check_shape(name, generation, topology)
    chips = _chips(topology)
    # A slice of up to 8 chips with a flat topology is one host. All other hosts have 4 chips.
    per_host = chips if facts.dimensions == 2 and chips <= 8 else 4
    vcpus, memory_gb = facts.machines[per_host]
    return Slice(
        generation=generation,
        topology=topology,
        chips=chips,
        hosts=chips // per_host,
        chips_per_host=per_host,
        accelerator_type=_accelerator_type(facts, topology) if topology in _usual(facts) else "",
        runtime_version=facts.runtime_version,
        gke_accelerator=facts.gke_accelerator,
        machine_type=f"{facts.machine_type}{per_host}t",
        vcpus=vcpus,
        memory_gb=memory_gb,
    )


def _usual(facts: Generation) -> tuple[str, ...]:
    return FLAT if facts.dimensions == 2 else USUAL


def _chips(topology: str) -> int:
    return math.prod(int(size) for size in topology.split("x"))


def _accelerator_type(facts: Generation, topology: str) -> str:
    return f"{facts.accelerator_type}{_chips(topology) * (2 if facts.counts_cores else 1)}"


def _check_shape(name: str, generation: str, topology: str) -> None:
    if GENERATIONS[generation].dimensions == 2:
        if topology not in FLAT:
            raise UserError(f"slice {name!r}: {generation} has the topologies {', '.join(FLAT)}")
        return
    sizes = (
        [int(size) for size in topology.split("x")]
        if re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", topology)
        else []
    )
    cubes = len(sizes) == 3 and sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    if topology not in SMALL and not cubes:
        raise UserError(
            f"slice {name!r}: {generation} has the topologies {', '.join(SMALL)}, and "
            "multiples of 4 in ascending order, such as 4x4x8"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the names of a slice, or one of them; return the exit code.

    Raises:
      UserError: there is no such slice, or no such name.
    """
    parser = cli.Parser("tpu.slices", __doc__)
    parser.add_argument("slice", type=parse_slice, metavar="SLICE", help="such as v5p:4x4x8 or v5p-256")
    parser.add_argument(
        "field", nargs="?", metavar="FIELD", help="print this name alone, as a shell script needs it"
    )
    arguments = parser.parse_args(argv)
    if arguments.field is None:
        print(dump_json(dataclasses.asdict(arguments.slice), indent=2))
        return 0
    value = getattr(arguments.slice, arguments.field, None)
    if value is None:
        names = [field.name for field in dataclasses.fields(Slice)]
        raise UserError(f"{arguments.field}: no such name; a slice has {', '.join(names)}, request")
    print(" ".join(value) if isinstance(value, list) else value)
    return 0


if __name__ == "__main__":
    cli.run(main)
