r"""Print the manifest of a JobSet, or the command for XPK, for a training job on TPU slices of GKE.

    python -m launch.tpu.jobset --name=fam-24b --slice=v5p:4x4x8 --image=REGION-docker.pkg.dev/PROJECT/REPO/fam_jax \
        -- --config=configs/passkey.py --workdir=gs://BUCKET/fam-24b | kubectl apply -f -

The arguments behind `--` are those of training. When a pod dies or is preempted, the others stop within a minute,
JobSet restarts all of them, and training resumes. A mistake in the command (exit code 2) is not retried.

JobSet: https://jobset.sigs.k8s.io/docs/concepts/; TPUs on GKE:
https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice and .../how-to/tpus.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from fam_jax.config import UserError

from .. import cli
from ..errors import USER_ERROR
from .slices import Slice, parse_slice

# Texts that kubectl takes for numbers or truth values unless they are quoted, and PyYAML does not quote: y, 1e3, 0o17.
AMBIGUOUS = re.compile(r"[yYnN]|[-+]?\.?\d.*", re.DOTALL)
CONTAINER = "train"
# Name of the replicated job, in whose names its index follows.
REPLICATED = "slice"
# From SIGTERM to SIGKILL: time for the current step and its checkpoint.
GRACE_SECONDS = 300
LIBTPU_PORT, MEGASCALE_PORT, JAX_COORDINATOR_PORT = 8471, 8080, 8482
# Label of nodes. A node pool is one slice.
NODE_POOL = "cloud.google.com/gke-nodepool"
# Label that JobSet gives to the pods of a job, the same for all pods of one slice.
JOB_KEY = "jobset.sigs.k8s.io/job-key"
# Parts of a machine that a pod requests; the node's own programs use the rest.
CPU_PART, MEMORY_PART = 0.9, 0.75
EPHEMERAL_STORAGE = "20Gi"

LABEL = "[a-z]([-a-z0-9]*[a-z0-9])?"
LONGEST_NAME, LONGEST_XPK_NAME = 63, 40


class Job(NamedTuple):
    """A training job."""

    name: str
    # What each slice is.
    tpu: Slice
    # Container image, built with launch/tpu/Dockerfile.
    image: str
    # Arguments of launch.train.
    arguments: tuple[str, ...]
    # How many slices work together.
    num_slices: int = 1
    # Whether to use preemptible nodes.
    spot: bool = False
    # How often the job is restarted before it counts as failed.
    restarts: int = 100
    # Kubernetes service account that may write to the bucket.
    account: str | None = None
    # Environment of the program.
    env: tuple[tuple[str, str], ...] = ()
    # Kubernetes quantities that a pod requests, one pod per host; None takes a part of the machine.
    cpu: str | None = None
    memory: str | None = None
    ephemeral_storage: str = EPHEMERAL_STORAGE
    # Whether the cluster is an Autopilot cluster.
    autopilot: bool = False

    @property
    def command(self) -> list[str]:
        """Return the command of each pod."""
        return ["python", "-m", "launch.train", *self.arguments]


def check(job: Job) -> None:
    """Raise :class:`UserError` if Kubernetes, JobSet or GKE would refuse the job."""
    if not re.fullmatch(LABEL, job.name):
        raise UserError(
            f"--name={job.name}: Kubernetes does not accept it; use lower-case letters, digits and dashes, with a "
            "letter at the beginning and no dash at the end"
        )
    # The longest name of a pod, with a suffix of five letters.
    suffix = f"-{REPLICATED}-{job.num_slices - 1}-{job.tpu.hosts - 1}-xxxxx"
    if len(job.name) + len(suffix) > LONGEST_NAME:
        raise UserError(
            f"--name={job.name}: is too long, because names of pods are made from it; use at most "
            f"{LONGEST_NAME - len(suffix)} characters"
        )
    if job.account is not None and not re.fullmatch(
        r"(?=.{1,253}\Z)[a-z0-9]([-.a-z0-9]*[a-z0-9])?", job.account
    ):
        raise UserError(
            f"--account={job.account}: Kubernetes does not accept it; give the name of a Kubernetes service account, "
            "which has lower-case letters, digits, dashes and dots"
        )
    if not re.fullmatch(r"\S+", job.image):
        raise UserError(
            f"--image={job.image}: is no image; give one such as REGION-docker.pkg.dev/PROJECT/REPO/fam_jax"
        )
    if job.num_slices > 1 and job.tpu.hosts == 1:
        raise UserError(
            f"--num_slices={job.num_slices}: a slice {job.tpu.generation}:{job.tpu.topology} is a single host, and GKE "
            "connects only slices of several hosts; use a larger --slice"
        )


def manifest(job: Job) -> dict[str, Any]:
    """Return the JobSet: a job for each slice, with one pod per host, all restarted together."""
    mistake = {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR]}
    spec = {
        "completionMode": "Indexed",
        "parallelism": job.tpu.hosts,
        "completions": job.tpu.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": _pod(job)},
    }
    # Put all pods of a slice into one node pool. JobSet does it with a node selector that Autopilot rejects.
    exclusive = {"annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": NODE_POOL}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, **({} if job.autopilot else exclusive)},
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": REPLICATED, "replicas": job.num_slices, "template": {"spec": spec}}],
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    place = {
        "cloud.google.com/gke-tpu-accelerator": job.tpu.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.tpu.topology,
    }
    resources = {
        "google.com/tpu": job.tpu.chips_per_host,
        "cpu": job.cpu or str(int(CPU_PART * job.tpu.vcpus)),
        "memory": job.memory or f"{int(MEMORY_PART * job.tpu.memory_gb)}Gi",
        "ephemeral-storage": job.ephemeral_storage,
    }
    several = job.num_slices > 1
    ports = (LIBTPU_PORT, *((MEGASCALE_PORT,) if several else ()), JAX_COORDINATOR_PORT)
    env = (_slices_env(job) if several else {}) | {
        name: {"value": _literal(value)} for name, value in job.env
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": place | ({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        **({"affinity": _one_slice_each()} if several and job.autopilot else {}),
        **({"serviceAccountName": job.account} if job.account else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": job.image,
                "command": [_literal(word) for word in job.command],
                **({"env": [{"name": name, **source} for name, source in env.items()]} if env else {}),
                "ports": [{"containerPort": port} for port in ports],
                "resources": {"requests": resources, "limits": dict(resources)},
            }
        ],
    }


def _slices_env(job: Job) -> dict[str, dict[str, Any]]:
    """Return the environment by which libtpu and JAX find the other slices. GKE itself connects the hosts of one."""
    index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    return {
        "MEGASCALE_NUM_SLICES": {"value": str(job.num_slices)},
        "MEGASCALE_SLICE_ID": {"valueFrom": {"fieldRef": {"fieldPath": index}}},
        # The first pod of the first slice, as JobSet's headless service names it.
        "MEGASCALE_COORDINATOR_ADDRESS": {"value": f"{job.name}-{REPLICATED}-0-0.{job.name}"},
    }


def _one_slice_each() -> dict[str, Any]:
    """Return the affinity that keeps the pods of a slice in one node pool, and those of all others out of it."""

    def term(keys: str) -> dict[str, Any]:
        labelled = {"matchExpressions": [{"key": JOB_KEY, "operator": "Exists"}]}
        where = {
            "labelSelector": labelled,
            keys: [JOB_KEY],
            "namespaceSelector": {},
            "topologyKey": NODE_POOL,
        }
        return {"requiredDuringSchedulingIgnoredDuringExecution": [where]}

    return {"podAffinity": term("matchLabelKeys"), "podAntiAffinity": term("mismatchLabelKeys")}


def _literal(text: str) -> str:
    """Return what Kubernetes, which replaces $(NAME) and $$ in commands and values, turns into `text`."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def xpk_command(job: Job) -> str:
    """Return the command with which XPK (https://github.com/AI-Hypercomputer/xpk) starts the job on its cluster.

    Raises:
      UserError: XPK has no name for the slice, or does not accept the name of the job.
    """
    if not job.tpu.accelerator_type:
        raise UserError(
            f"slice {job.tpu.generation}:{job.tpu.topology}: XPK has no name for this topology; leave out --xpk"
        )
    if len(job.name) > LONGEST_XPK_NAME:
        raise UserError(f"--name={job.name}: is too long for XPK; use at most {LONGEST_XPK_NAME} characters")
    # XPK has --env, but breaks values that contain quotes or backslashes.
    env = ["env", *(f"{name}={value}" for name, value in job.env)] if job.env else []
    words = [
        f"--workload={job.name}",
        f"--tpu-type={job.tpu.accelerator_type}",
        f"--num-slices={job.num_slices}",
        f"--docker-image={job.image}",
        f"--max-restarts={job.restarts}",
        f"--command={_literal(shlex.join([*env, *job.command]))}",
    ]
    return f"xpk workload create --cluster=$CLUSTER {shlex.join(words)}"


# Flags that have no counterpart in XPK, which settles them for the whole cluster.
NOT_FOR_XPK = ("spot", "account", "cpu", "memory", "ephemeral_storage", "autopilot")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `train` holds the arguments behind `--`.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    given = [*(sys.argv[1:] if argv is None else argv)]
    border = given.index("--") if "--" in given else len(given)
    parser = cli.Parser("tpu.jobset", __doc__)
    add = parser.add_argument
    add("--name", required=True, metavar="NAME", help="name of the JobSet")
    add("--slice", required=True, type=parse_slice, metavar="SLICE", help="such as v5p:4x4x8 or v5p-256")
    several = "slices that work together; default: %(default)s"
    add("--num_slices", type=cli.at_least(1), default=1, metavar="N", help=several)
    add("--image", required=True, metavar="IMAGE", help="container image, built with launch/tpu/Dockerfile")
    add("--spot", action="store_true", help="use preemptible nodes")
    restarts = "how often to restart the job before it counts as failed; default: %(default)s"
    add("--restarts", type=cli.at_least(0), default=100, metavar="N", help=restarts)
    add("--account", metavar="NAME", help="Kubernetes service account that may write to the bucket")
    variable = "environment variable of the job; may be repeated"
    add("--env", type=variable_of, action="append", default=[], metavar="NAME=VALUE", help=variable)
    part = "that each host's pod requests, such as {}; default: {:.0%} of the machine"
    add("--cpu", type=quantity, metavar="N", help=f"CPUs {part}".format("100", CPU_PART).replace("%", "%%"))
    memory = f"memory {part}".format("300Gi", MEMORY_PART).replace("%", "%%")
    add("--memory", type=quantity, metavar="SIZE", help=memory)
    disk = "disk space that each host's pod requests; default: %(default)s"
    add("--ephemeral_storage", type=quantity, default=EPHEMERAL_STORAGE, metavar="SIZE", help=disk)
    add("--autopilot", action="store_true", help="the cluster is an Autopilot cluster")
    add("--xpk", action="store_true", help="print the command for XPK instead of the manifest")
    found = parser.parse_args(given[:border])
    found.train = given[border + 1 :]
    if not workdir_of(found.train).startswith("gs://"):
        raise UserError("missing --workdir=gs://... behind --; pods keep no files, so it must be in a bucket")
    return found


def variable_of(text: str) -> tuple[str, str]:
    """Argument type: NAME=VALUE of an environment variable."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, such as XLA_FLAGS=--xla_dump_to=DIR, got {text!r}"
        )
    return name, value


def quantity(text: str) -> str:
    """Argument type: a positive Kubernetes quantity."""
    if not re.fullmatch(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?", text):
        raise argparse.ArgumentTypeError(f"expected an amount, such as 4, 500m, 100Gi or 1.5Ti, got {text!r}")
    return text


def workdir_of(arguments: Sequence[str]) -> str:
    """Return the --workdir that arguments of launch.train end up with, or an empty string."""
    found = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == "--workdir":
            found = value if equals else following
    return found


class _Dumper(yaml.SafeDumper):
    """Quotes what another version of YAML would not take for text."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if AMBIGUOUS.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the manifest or the command; return the exit code.

    Raises:
      UserError: the command line has a mistake, Kubernetes would refuse the job, or XPK has no name for the slice.
    """
    found = parse_arguments(argv)
    job = Job(
        name=found.name,
        tpu=found.slice,
        image=found.image,
        arguments=tuple(found.train),
        num_slices=found.num_slices,
        spot=found.spot,
        restarts=found.restarts,
        account=found.account,
        env=tuple(dict(found.env).items()),
        cpu=found.cpu,
        memory=found.memory,
        ephemeral_storage=found.ephemeral_storage,
        autopilot=found.autopilot,
    )
    check(job)
    if not found.xpk:
        print(yaml.dump(manifest(job), Dumper=_Dumper, sort_keys=False, width=110), end="")
        return 0
    print(xpk_command(job))
    unused = [f"--{name}" for name in NOT_FOR_XPK if getattr(job, name) != Job._field_defaults[name]]
    if unused:
        print(f"left out {', '.join(unused)}, which XPK's cluster decides", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
