r"""Print the manifest of a JobSet, or the command for XPK, for a training job on one TPU slice of GKE.

    python -m launch.tpu.jobset --name=fam-24b --slice=v5p:4x4x8 --image=REGION-docker.pkg.dev/PROJECT/REPO/fam_jax \
        -- --config=configs/passkey.py --workdir=gs://BUCKET/fam-24b | kubectl apply -f -

The arguments behind `--` go to launch.train. When a pod dies or is preempted, the others stop within a minute, JobSet
restarts all of them, and training resumes. A mistake in the command (exit code 2) is not retried.

JobSet: https://jobset.sigs.k8s.io/docs/concepts/; TPUs on GKE:
https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice and .../how-to/tpus.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from fam_jax.config import UserError

from .. import cli
from ..errors import USER_ERROR
from .slices import Slice, parse_slice

CONTAINER = "train"
# From SIGTERM to SIGKILL: time for the current step and its checkpoint.
GRACE_SECONDS = 300
LIBTPU_PORT, JAX_COORDINATOR_PORT = 8471, 8482


class Job(NamedTuple):
    """A training job."""

    name: str
    tpu: Slice
    # Container image, built with launch/tpu/Dockerfile.
    image: str
    # Arguments of launch.train.
    arguments: tuple[str, ...]
    # Whether to use preemptible nodes.
    spot: bool = False
    # How often the job is restarted before it counts as failed.
    restarts: int = 100
    # Kubernetes service account that may write to the bucket.
    account: str | None = None

    @property
    def command(self) -> list[str]:
        """Return the command of each pod."""
        return ["python", "-m", "launch.train", *self.arguments]


def manifest(job: Job) -> dict[str, Any]:
    """Return the JobSet: one pod per host of the slice, restarted together."""
    mistake = {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR]}
    spec = {
        "completionMode": "Indexed",
        "parallelism": job.tpu.hosts,
        "completions": job.tpu.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": _pod(job)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # Put all pods of a job into one node pool, which is one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": spec}}],
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    place = {
        "cloud.google.com/gke-tpu-accelerator": job.tpu.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.tpu.topology,
    }
    chips = {"google.com/tpu": job.tpu.chips_per_host}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": place | ({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        **({"serviceAccountName": job.account} if job.account else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": job.image,
                "command": job.command,
                "ports": [{"containerPort": port} for port in (LIBTPU_PORT, JAX_COORDINATOR_PORT)],
                "resources": {"requests": chips, "limits": dict(chips)},
            }
        ],
    }


def xpk_command(job: Job) -> str:
    """Return the command with which XPK (https://github.com/AI-Hypercomputer/xpk) starts the job on its cluster.

    Raises:
      UserError: XPK has no name for the slice.
    """
    if not job.tpu.accelerator_type:
        raise UserError(
            f"slice {job.tpu.generation}:{job.tpu.topology}: XPK has no name for this topology; leave out --xpk"
        )
    words = [
        "xpk",
        "workload",
        "create",
        "--cluster=$CLUSTER",
        f"--workload={job.name}",
        f"--tpu-type={job.tpu.accelerator_type}",
        "--num-slices=1",
        f"--docker-image={job.image}",
        f"--max-restarts={job.restarts}",
        f"--command={shlex.join(job.command)}",
    ]
    return " ".join(word if "$" in word else shlex.quote(word) for word in words)


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
    add("--slice", required=True, type=parse_slice, metavar="SLICE", help="such as v5p:4x4x8")
    add("--image", required=True, metavar="IMAGE", help="container image, built with launch/tpu/Dockerfile")
    add("--spot", action="store_true", help="use preemptible nodes")
    add(
        "--restarts",
        type=cli.at_least(0),
        default=100,
        metavar="N",
        help="how often to restart the job before it counts as failed; default: %(default)s",
    )
    add("--account", metavar="NAME", help="Kubernetes service account that may write to the bucket")
    add("--xpk", action="store_true", help="print the command for XPK instead of the manifest")
    found = parser.parse_args(given[:border])
    found.train = given[border + 1 :]
    if not any(argument.startswith("--workdir=gs://") for argument in found.train):
        raise UserError("missing --workdir=gs://... behind --; pods keep no files, so it must be in a bucket")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the manifest or the command; return the exit code.

    Raises:
      UserError: the command line has a mistake, or XPK has no name for the slice.
    """
    found = parse_arguments(argv)
    job = Job(
        found.name, found.slice, found.image, tuple(found.train), found.spot, found.restarts, found.account
    )
    if found.xpk:
        print(xpk_command(job))
    else:
        print(yaml.safe_dump(manifest(job), sort_keys=False, width=110), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
