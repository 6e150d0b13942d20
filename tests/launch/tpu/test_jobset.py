"""The manifest for GKE: check its Job with Kubernetes' own schema, and the JobSet with a schema of its fields."""

import pathlib
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fam_jax.config import UserError
from launch.tpu import jobset
from tests.launch.running import ROOT

TRAIN = ["--", "--config=configs/passkey.py", "--workdir=gs://bucket/run", "--config.train.steps=9"]
KUBERNETES = "1.31"


def closed(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
# jobset.x-k8s.io/v1alpha2: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
JOBSET = closed(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(
        name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}
    ),
    spec=closed(
        failurePolicy=closed(
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": closed(
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                "MaxFailedIndexesExceeded", "PodFailurePolicy",
                            ]
                        },
                    },
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "items": closed(
                name=NAME,
                replicas={"type": "integer", "minimum": 1},
                template=closed(spec={"type": "object"}),
            ),
        },
    ),
)  # fmt: skip


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    jobset.main(["--name=fam", "--image=registry/fam", *arguments, *TRAIN])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "accelerator", "topology", "hosts", "chips"),
    [
        ("v5p:4x4x8", "tpu-v5p-slice", "4x4x8", 32, 4),
        ("v5e:4x8", "tpu-v5-lite-podslice", "4x8", 8, 4),
        ("v6e:2x4", "tpu-v6e-slice", "2x4", 1, 8),
        ("v4:2x2x1", "tpu-v4-podslice", "2x2x1", 1, 4),
    ],
)
@pytest.mark.parametrize("options", [[], ["--spot", "--account=trainer", "--restarts=3"]])
def test_the_manifest(
    name: str, accelerator: str, topology: str, hosts: int, chips: int, options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = made(capsys, f"--slice={name}", *options)
    jsonschema.validate(found, JOBSET)
    (replicated,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)

    assert job["spec"]["parallelism"] == job["spec"]["completions"] == hosts
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert container["command"] == ["python", "-m", "launch.train", *TRAIN[1:]]
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == bool(options)
    assert pod.get("serviceAccountName") == ("trainer" if options else None)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == (3 if options else 100)


def test_the_validation_can_fail(capsys: pytest.CaptureFixture[str]) -> None:
    found = made(capsys, "--slice=v5e:4x8")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    job |= found["spec"]["replicatedJobs"][0]["template"]
    job["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "kind": "Job"}, JOBSET)


def test_the_command_for_xpk(capsys: pytest.CaptureFixture[str]) -> None:
    jobset.main(["--name=fam", "--image=registry/fam", "--slice=v5p:4x4x8", "--xpk", *TRAIN])
    assert capsys.readouterr().out == (
        "xpk workload create --cluster=$CLUSTER --workload=fam --tpu-type=v5p-256 --num-slices=1 "
        "--docker-image=registry/fam --max-restarts=100 '--command=python -m launch.train "
        "--config=configs/passkey.py --workdir=gs://bucket/run --config.train.steps=9'\n"
    )
    with pytest.raises(UserError, match="XPK has no name for this topology"):
        jobset.main(["--name=fam", "--image=registry/fam", "--slice=v5p:4x4x16", "--xpk", *TRAIN])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slice=v5p:4x4x8", "--", "--workdir=runs/x"], "missing --workdir=gs://... behind --"),
        (["--slice=v5p:4x4x9", *TRAIN], "slice 'v5p:4x4x9'"),
        (TRAIN, "missing --slice"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        jobset.main(["--name=fam", "--image=registry/fam", *arguments])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    folder = pathlib.Path(ROOT) / "launch" / "tpu"
    lines = (folder / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    kept = re.findall(r"^!(\S+)$", (folder / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(copied) == sorted(kept)
    assert all((pathlib.Path(ROOT) / name).exists() for name in copied)
