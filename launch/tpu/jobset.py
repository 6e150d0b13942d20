r"""A training job on GKE: prints the manifest of a JobSet, or the line for XPK, for one TPU slice.

    python -m launch.tpu.jobset --name=fam-24b --slice=v5p:4x4x8 --image=REGION-docker.pkg.dev/PROJECT/REPO/fam_jax \
        -- --config=configs/passkey.py --workdir=gs://BUCKET/fam-24b | kubectl apply -f -

What stands behind `--` goes to `launch.train`. When a pod dies, or is preempted, the others stop too (within a minute),
JobSet starts all of them again, and training resumes. A mistake in the command (exit code 2) is not tried again.
JobSet: https://jobset.sigs.k8s.io/docs/concepts/; TPUs on GKE:
https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice and .../how-to/tpus.
"""

import argparse
import shlex
import sys
from typing import Any

import yaml

from fam_jax.config import UserError
from launch.cli import ArgumentParser
from launch.errors import USER_ERROR, user_errors
from launch.tpu.slices import Slice, parse_slice

CONTAINER = "train"
GRACE_SECONDS = 300  # from SIGTERM to SIGKILL: for the step under way and its checkpoint


def manifest(
    name: str, tpu: Slice, image: str, arguments: list[str], *, spot: bool, restarts: int, account: str | None
) -> dict[str, Any]:
    """The JobSet: one pod per host of the slice, restarted together.

    Args:
      name: of the JobSet.
      tpu: the slice.
      image: container image, built from launch/tpu/Dockerfile.
      arguments: of `launch.train`.
      spot: takes preemptible nodes.
      restarts: how often the job is started again before it counts as failed.
      account: Kubernetes service account that may write to the bucket.
    """
    pod = _pod(tpu, image, arguments, spot=spot, account=account)
    mistake = {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR]}
    job = {
        "completionMode": "Indexed",
        "parallelism": tpu.hosts,
        "completions": tpu.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # All pods of a job in one node pool: that is, in one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(tpu: Slice, image: str, arguments: list[str], *, spot: bool, account: str | None) -> dict[str, Any]:
    place = {
        "cloud.google.com/gke-tpu-accelerator": tpu.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    chips = {"google.com/tpu": tpu.chips_per_host}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": place | ({"cloud.google.com/gke-spot": "true"} if spot else {}),
        **({"serviceAccountName": account} if account else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": image,
                "command": ["python", "-m", "launch.train", *arguments],
                "ports": [
                    {"containerPort": 8471},
                    {"containerPort": 8482},
                ],  # libtpu's, and JAX's coordinator
                "resources": {"requests": chips, "limits": dict(chips)},
            }
        ],
    }


def xpk_line(name: str, tpu: Slice, image: str, arguments: list[str]) -> str:
    """The command by which XPK (https://github.com/AI-Hypercomputer/xpk) starts the same job on its cluster.

    Raises:
      UserError: XPK has no name for a slice of this shape.
    """
    if not tpu.accelerator_type:
        raise UserError(
            f"slice {tpu.generation}:{tpu.topology}: XPK knows no type of this shape; use the JobSet"
        )
    inner = shlex.join(["python", "-m", "launch.train", *arguments])
    words = [
        "xpk", "workload", "create", "--cluster=$CLUSTER", f"--workload={name}", f"--tpu-type={tpu.accelerator_type}",
        "--num-slices=1", f"--docker-image={image}", "--max-restarts=100", f"--command={inner}",
    ]  # fmt: skip
    return " ".join(word if "$" in word else shlex.quote(word) for word in words)


def main(argv: list[str]) -> None:
    """Prints."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, rest = argv[:at], argv[at + 1 :]
    parser = ArgumentParser(prog="python -m launch.tpu.jobset", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--slice", required=True, type=parse_slice, metavar="v5p:4x4x8")
    parser.add_argument("--image", required=True)
    parser.add_argument("--spot", action="store_true", help="preemptible nodes")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--account", help="Kubernetes service account that may write to the bucket")
    parser.add_argument("--xpk", action="store_true", help="print the line for XPK instead")
    found: argparse.Namespace = parser.parse_args(own)
    if not any(argument.startswith("--workdir=gs://") for argument in rest):
        raise UserError(
            "give the arguments of launch.train behind --, with --workdir=gs://...: pods keep no files"
        )
    if found.xpk:
        print(xpk_line(found.name, found.slice, found.image, rest))
        return
    made = manifest(
        found.name,
        found.slice,
        found.image,
        rest,
        spot=found.spot,
        restarts=found.restarts,
        account=found.account,
    )
    print(yaml.safe_dump(made, sort_keys=False, width=110), end="")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
