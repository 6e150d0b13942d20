"""The manifest for GKE: check its Job with Kubernetes' own schema, and the JobSet with a schema of its fields."""

import pathlib
import re
import shlex
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from fam_jax.config import UserError
from launch.tpu import jobset
from launch.tpu.slices import parse_slice
from tests.launch.running import ROOT

TRAIN = ["--", "--config=configs/passkey.py", "--workdir=gs://bucket/run", "--config.train.steps=9"]
KUBERNETES = "1.31"


def closed(*optional: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
# jobset.x-k8s.io/v1alpha2: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
JOBSET = closed(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(
        "annotations", name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}
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


def made(capsys: pytest.CaptureFixture[str], *arguments: str, train: list[str] = TRAIN) -> dict[str, Any]:
    """Return a manifest that conforms to the schemas."""
    jobset.main(["--name=fam", "--image=registry/fam", *arguments, *train])
    found = yaml.safe_load(capsys.readouterr().out)
    jsonschema.validate(found, JOBSET)
    (replicated,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    return found


def pod_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def expanded(text: str, variables: dict[str, str]) -> str:
    """Return what Kubernetes makes of a word of a command or the value of a variable.

    https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#entrypoint: $(NAME) becomes the
    variable's value if there is one, $$ becomes $.
    """
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )


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
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]
    assert replicated["replicas"] == 1
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == hosts
    pod = pod_of(found)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert "env" not in container and "affinity" not in pod
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


GIB, GB = 2**30, 10**9


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5e-16", "v6e-1", "v6e-8", "v6e-16", "v5p-8", "v4-8"])
def test_what_a_pod_requests_fits_its_machine(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """GKE reserves a part of the CPUs and of the memory of a node.

    https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes, "Memory and CPU reservations".
    """
    tpu = parse_slice(name)
    resources = pod_of(made(capsys, f"--slice={name}"))["containers"][0]["resources"]["requests"]
    cpus, memory = int(resources["cpu"]), int(resources["memory"].removesuffix("Gi")) * GIB
    # In GB: a quarter of the first 4, a fifth of the next 4, a tenth of the next 8, 6% of the next 112, 2% of the rest.
    reserved = (
        0.25 * 4
        + 0.2 * 4
        + 0.1 * 8
        + 0.06 * min(tpu.memory_gb - 16, 112)
        + 0.02 * max(tpu.memory_gb - 128, 0)
    )
    assert tpu.memory_gb * GB * 0.5 < memory < (tpu.memory_gb - reserved - 1) * GB
    assert tpu.vcpus * 0.8 < cpus < tpu.vcpus - 1
    assert resources["ephemeral-storage"] == "20Gi"


def test_requests_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = ["--cpu=3500m", "--memory=1.5Gi", "--ephemeral-storage=100Gi"]
    resources = pod_of(made(capsys, "--slice=v5e-16", *by_hand))["containers"][0]["resources"]
    wanted = {"google.com/tpu": 4, "cpu": "3500m", "memory": "1.5Gi", "ephemeral-storage": "100Gi"}
    assert resources == {"requests": wanted, "limits": wanted}


EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"


def test_several_slices(capsys: pytest.CaptureFixture[str]) -> None:
    found = made(capsys, "--slice=v5p:4x4x8", "--num_slices=3")
    (replicated,) = found["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 3 and replicated["template"]["spec"]["completions"] == 32
    assert found["metadata"]["annotations"] == {EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    pod = pod_of(found)
    env = {variable.pop("name"): variable for variable in pod["containers"][0]["env"]}
    # What jax._src.clusters.cloud_tpu_cluster and libtpu read.
    assert env.keys() == {"MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"}
    assert env["MEGASCALE_NUM_SLICES"] == {"value": "3"}
    label = env["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    # HOSTNAME.SUBDOMAIN, which are JOBSET-JOB-INDEX-POD and JOBSET.
    assert env["MEGASCALE_COORDINATOR_ADDRESS"] == {"value": f"fam-{replicated['name']}-0-0.fam"}
    assert [port["containerPort"] for port in pod["containers"][0]["ports"]] == [8471, 8080, 8482]


# What Autopilot lets a pod select nodes by, of what the manifest uses.
ALLOWED = {
    "cloud.google.com/gke-tpu-accelerator",
    "cloud.google.com/gke-tpu-topology",
    "cloud.google.com/gke-spot",
}


def test_autopilot(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the annotation, for which JobSet would select node pools by name."""
    found = made(capsys, "--slice=v5e-16", "--spot", "--autopilot")
    assert "annotations" not in found["metadata"]
    assert pod_of(found)["nodeSelector"].keys() == ALLOWED and "affinity" not in pod_of(found)

    affinity = pod_of(made(capsys, "--slice=v5e-16", "--autopilot", "--num_slices=2"))["affinity"]
    for kind, keys in {"podAffinity": "matchLabelKeys", "podAntiAffinity": "mismatchLabelKeys"}.items():
        (term,) = affinity[kind]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "cloud.google.com/gke-nodepool"
        assert term[keys] == ["jobset.sigs.k8s.io/job-key"]


NASTY = {
    "XLA_FLAGS": "--a=1 --b=2",
    "DOLLARS": "${X} $(X) $$ $X $$(X) $$$ $",
    "QUOTES": """it's "quoted" \\ and `run`""",
    "COMMAS": "a,b=c;d|e&f",
    "EMPTY": "",
    "LINES": "one\ntwo: 'x'\n",
    "YAML": "- yes",
}


def test_environment_and_arguments_arrive_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["--", "--workdir=gs://b/x", *(f"--{name}={value}" for name, value in NASTY.items())]
    options = [part for name, value in NASTY.items() for part in ("--env", f"{name}={value}")]
    (container,) = pod_of(made(capsys, "--slice=v5e-16", "--env=EMPTY=first", *options, train=train))[
        "containers"
    ]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    X = {"X": "wrong"}
    assert {name: expanded(value, X) for name, value in variables.items()} == NASTY
    assert [expanded(word, X) for word in container["command"]] == [
        "python",
        "-m",
        "launch.train",
        *train[1:],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "y",
        "N",
        "1e3",
        "0o17",
        "0b1",
        "1_000",
        ".5",
        "+12e03",
        "-.1",
        "0x1F",
        "on",
        "null",
        "~",
        "1:30",
        "12e",
    ],
)
def test_texts_that_kubectl_would_take_for_something_else_are_quoted(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """It reads another version of YAML than PyYAML: to it, `y` is true and `1e3` is 1000."""
    jobset.main(
        [
            "--name=fam",
            "--image=i",
            "--slice=v5e-16",
            "--env",
            f"A={text}",
            "--",
            "--workdir=gs://b/x",
            "--note",
            text,
        ]
    )
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    quoted = {f'"{text}"', f"'{text}'"}
    assert lines[lines.index("- name: A") + 1].removeprefix("value: ") in quoted
    assert lines[lines.index("- --note") + 1].removeprefix("- ") in quoted


def test_the_command_for_xpk(capsys: pytest.CaptureFixture[str]) -> None:
    jobset.main(["--name=fam", "--image=registry/fam", "--slice=v5p:4x4x8", "--xpk", *TRAIN])
    found = capsys.readouterr()
    assert found.out == (
        "xpk workload create --cluster=$CLUSTER --workload=fam --tpu-type=v5p-256 --num-slices=1 "
        "--docker-image=registry/fam --max-restarts=100 '--command=python -m launch.train "
        "--config=configs/passkey.py --workdir=gs://bucket/run --config.train.steps=9'\n"
    )
    assert found.err == ""
    with pytest.raises(UserError, match="XPK has no name for this topology"):
        jobset.main(["--name=fam", "--image=registry/fam", "--slice=v5p:4x4x16", "--xpk", *TRAIN])
    jobset.main(
        ["--name=fam", "--image=i", "--slice=v5e-16", "--xpk", "--num_slices=2", "--spot", "--cpu=1", *TRAIN]
    )
    found = capsys.readouterr()
    assert "--num-slices=2" in found.out
    assert found.err == "left out --spot, --cpu, which XPK's cluster decides\n"


def test_the_command_for_xpk_is_one_word_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["--", "--workdir", "gs://b/${RUN}", *(f"--{name}={value}" for name, value in NASTY.items())]
    options = [f"--env={name}={value}" for name, value in NASTY.items()]
    jobset.main(["--name=fam", "--image=i", "--slice=v5p:4x4x8", "--xpk", *options, *train])
    words = shlex.split(capsys.readouterr().out)
    assert words[:4] == ["xpk", "workload", "create", "--cluster=$CLUSTER"]
    assert all(word.startswith("--") for word in words[3:])
    assert words[-1].startswith("--command=")
    # XPK's pod gives it to bash, after Kubernetes.
    command = shlex.split(expanded(words[-1].removeprefix("--command="), {"X": "wrong"}))
    env = [f"{name}={value}" for name, value in NASTY.items()]
    assert command == ["env", *env, "python", "-m", "launch.train", *train[1:]]


@pytest.mark.parametrize("workdir", [["--workdir", "gs://b/x"], ["--workdir=/tmp/x", "--workdir=gs://b/x"]])
def test_workdirs(workdir: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = made(capsys, "--slice=v5e-16", train=["--", *workdir])
    assert pod_of(found)["containers"][0]["command"][3:] == workdir


# Of the longest accepted name: JobSet adds "-slice-0-7-" and five letters.
LONGEST = "a" * (63 - len("-slice-0-7-abcde"))


def test_the_longest_name(capsys: pytest.CaptureFixture[str]) -> None:
    jobset.main([f"--name={LONGEST}", "--image=i", "--slice=v5e:4x8", *TRAIN])
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["metadata"]["name"] == LONGEST


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slice=v5p:4x4x8", "--", "--workdir=runs/x"], "missing --workdir=gs://... behind --"),
        (["--slice=v5p:4x4x8", "--", "--workdir", "x", "--x=--workdir=gs://b"], "missing --workdir=gs://"),
        (["--slice=v5p:4x4x8", "--", "--workdir=gs://b/x", "--workdir=x"], "missing --workdir=gs://"),
        (["--slice=v5p:4x4x8", "--", "--workdir"], "missing --workdir=gs://"),
        (["--slice=v5p:4x4x9", *TRAIN], "slice 'v5p:4x4x9'"),
        (TRAIN, "missing --slice"),
        (["--name=my_run", *TRAIN], "--name=my_run: Kubernetes does not accept it; use lower-case letters"),
        (["--name=Fam-24B", *TRAIN], "--name=Fam-24B: Kubernetes does not accept it"),
        (["--name=-fam", *TRAIN], "--name=-fam: Kubernetes does not accept it"),
        (["--name=fam-", *TRAIN], "--name=fam-: Kubernetes does not accept it"),
        (["--name=1fam", *TRAIN], "--name=1fam: Kubernetes does not accept it"),
        (["--name=", *TRAIN], "--name=: Kubernetes does not accept it"),
        (["--name=fam\n", *TRAIN], "--name=fam : Kubernetes does not accept it"),
        ([f"--name={LONGEST}a", "--slice=v5e:4x8", *TRAIN], f"--name={LONGEST}a: is too long, because"),
        (
            [f"--name={LONGEST}", "--slice=v5e:4x8", "--num_slices=11", *TRAIN],
            f"--name={LONGEST}: is too long",
        ),
        ([f"--name={'a' * 41}", "--xpk", *TRAIN], f"--name={'a' * 41}: is too long for XPK; use at most 40"),
        (["--account=My_Account", *TRAIN], "--account=My_Account: Kubernetes does not accept it"),
        (["--image=", *TRAIN], "--image=: is no image"),
        (["--restarts=-3", *TRAIN], "argument --restarts: must be at least 0, got -3"),
        (["--restarts=2147483648", *TRAIN], "argument --restarts: must be at most 2147483647, got"),
        (["--restarts=x", *TRAIN], "argument --restarts: expected a whole number, got 'x'"),
        (["--num_slices=0", *TRAIN], "argument --num_slices: must be at least 1, got 0"),
        (["--num_slices=2", "--slice=v5e:2x4", *TRAIN], "--num_slices=2: a slice v5e:2x4 is a single host"),
        (["--env=A", *TRAIN], "argument --env: expected NAME=VALUE"),
        (["--env=A-B=c", *TRAIN], "argument --env: expected NAME=VALUE"),
        (["--env==c", *TRAIN], "argument --env: expected NAME=VALUE"),
        (["--memory=10GB", *TRAIN], "argument --memory: expected an amount, such as 4, 500m, 100Gi"),
        (["--cpu=0", *TRAIN], "argument --cpu: expected an amount"),
        (["--cpu=-1", *TRAIN], "argument --cpu: expected an amount"),
        (["--ephemeral-storage=", *TRAIN], "argument --ephemeral_storage: expected an amount"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = (
        ["--slice=v5p:4x4x8"] if "--name" in arguments[0] or not arguments[0].startswith("--slice") else []
    )
    given = [] if arguments is TRAIN else ["--slice=v5p:4x4x8"]
    with pytest.raises(UserError) as caught:
        jobset.main(["--name=fam", "--image=registry/fam", *given, *arguments])
    assert " ".join(str(caught.value).split()).startswith(says)
    assert capsys.readouterr().out == ""


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    folder = pathlib.Path(ROOT) / "launch" / "tpu"
    lines = (folder / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    kept = re.findall(r"^!(\S+)$", (folder / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(copied) == sorted(kept)
    assert all((pathlib.Path(ROOT) / name).exists() for name in copied)
