"""Trials of `benchmarks.soak` with processes: kills, full disks, lost workers, and checkpoints without leaks."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT

STEPS = 40
CONFIG = [
    "--config=configs/text.py:smoke", f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=4",
    "--config.train.log_every=2", "--config.train.keep_checkpoints=3", "--config.evaluate.every=8",
    "--config.evaluate.documents=2", "--config.evaluate.ablations=zeroed",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A process that should end counts as hung if it uses less than this CPU time in so many seconds, or after an hour. On a
# busy machine, time on the wall alone says nothing.
IDLE_CPU, IDLE_SECONDS, LONGEST = 0.1, 120.0, 3600.0
# Exit codes after which launch/tpu/fam-jax.service does not start a job again.
NOT_AGAIN = (2,)
# Starts of a job of two processes until it is finished. On a busy machine they may not find each other in time.
MOST_STARTS = 5
# Most lines that a run may print because of a full disk.
LINES = 30


class Runs:
    """Folders and commands of the runs to break."""

    def __init__(self, workdir: Path):
        """Write the data, which must not change while runs read it."""
        self.workdir, self.scratch = workdir, workdir / "scratch"
        self.scratch.mkdir(exist_ok=True)
        for name, first, count in (("train", 0, 12), ("heldout", 100, 3)):
            (workdir / name).mkdir(exist_ok=True)
            for number in range(first, first + count):
                words = random.Random(number).choices(
                    ["one", "two", "three", "four", "five", "six", "seven"], k=600
                )
                (workdir / name / f"{number}.txt").write_text(" ".join(words))

    def command(self, folder: Path, *more: str) -> list[str]:
        """Return the command of a run in a folder."""
        data = [
            f"--config.data.train_files={self.workdir / 'train'}",
            f"--config.data.heldout_files={self.workdir / 'heldout'}",
            "--config.data.file_suffixes=.txt",
        ]
        return [sys.executable, "-m", "launch.train", f"--workdir={folder}", *CONFIG, *data, *more]

    def environment(self) -> dict[str, str]:
        """Return the environment, with a cache of compiled programs."""
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.workdir / "compiled")}
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            **cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }

    def start(self, folder: Path, *more: str, **how: Any) -> subprocess.Popen[str]:
        """Start a run. Its output goes to a file beside the folder."""
        log = folder.with_suffix(".log").open("a")
        return subprocess.Popen(
            self.command(folder, *more),
            cwd=ROOT,
            env=self.environment(),
            stdout=log,
            stderr=log,
            text=True,
            **how,
        )

    def reference(self) -> Path:
        """Return the folder of a run that nothing disturbed."""
        folder = self.workdir / "reference"
        if self.start(folder).wait() != 0:
            raise RuntimeError(f"the undisturbed run failed; see {folder.with_suffix('.log')}")
        return folder


def results(folder: Path) -> dict[str, Any]:
    """Return all that a finished run computed: checksums of its arrays, position in the data, metrics, evaluations."""
    record = json.loads((folder / str(STEPS) / "contents" / "data.json").read_text())["record"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        # These depend on the time, and on when the command began.
        line.pop("tokens_per_second", None)
    return {
        "params": record["params"],
        "training": record["training"],
        "at": record["position"],
        "lines": lines,
    }


def ended(process: subprocess.Popen[str]) -> int | None:
    """Return the exit code; None if it had to be killed because it hung."""
    began = looked = time.monotonic()
    used = cpu_time(process.pid)
    while True:
        try:
            return process.wait(5)
        except subprocess.TimeoutExpired:
            now, later = time.monotonic(), cpu_time(process.pid)
        if later - used > IDLE_CPU:
            looked, used = now, later
        if now - looked > IDLE_SECONDS or now - began > LONGEST:
            process.kill()
            process.wait()
            return None


def cpu_time(pid: int) -> float:
    """Return the seconds of CPU time that a process and all its descendants have used.

    A process of a job runs as the child of another, which sleeps.
    """
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(stat.parent.name)
        parents[number] = int(fields[1])
        ticks[number] = sum(map(int, fields[11:15]))
    family, found = {pid}, 0
    while len(family) > found:
        found = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(ticks.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


def kills(runs: Runs, numbers: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Stop a run at random moments until it is finished, compare it with an undisturbed one, and begin again."""
    wanted = results(runs.reference())
    shutil.rmtree(runs.scratch / "timed", ignore_errors=True)
    began = time.monotonic()
    runs.start(runs.scratch / "timed").wait()
    whole = time.monotonic() - began
    done, number = 0, 0
    while done < count:
        number += 1
        folder = runs.scratch / f"killed{number}"
        shutil.rmtree(folder, ignore_errors=True)
        own: list[dict[str, Any]] = []
        while True:
            process, which = runs.start(folder), numbers.choice(SIGNALS)
            began = time.monotonic()
            try:
                code: int | None = process.wait(numbers.uniform(0.3, 1.2) * whole)
            except subprocess.TimeoutExpired:
                process.send_signal(which)
                code = ended(process)
                own.append(
                    {"what": which.name, "code": code, "outcome": "hung" if code is None else "survived"}
                )
                continue
            if code == 0:
                if not own:  # a measurement of the time on a machine that may be busy
                    whole = time.monotonic() - began
                break
            own.append({"what": "no signal", "code": code, "outcome": "lost"})
            break
        if own and own[-1]["outcome"] != "lost" and results(folder) != wanted:
            own[-1]["outcome"] = "silent"
        if own and any(".orbax-checkpoint-tmp" in path.name for path in folder.iterdir()):
            own[-1]["left"] = "an unfinished checkpoint"
        yield from own
        done += len(own)


def disks(runs: Runs, numbers: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Run where no file may grow beyond a size, then without the limit."""
    wanted = results(runs.reference())
    for number in range(count):
        folder = runs.scratch / f"full{number}"
        limit = numbers.choice([4, 40, 80, 200]) << 10
        for each in (folder, folder.with_suffix(".log")):
            shutil.rmtree(each, ignore_errors=True)

        def restrict(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code = ended(runs.start(folder, "--quiet", preexec_fn=restrict))
        said = folder.with_suffix(".log").read_text()
        outcome = "noticed" if code in (75, 2) else "survived" if code == 0 else "lost"
        outcome = "hung" if code is None else outcome
        if "Traceback" in said or len(said.splitlines()) > LINES:
            outcome = "traceback"
        again = ended(runs.start(folder))
        if outcome in ("noticed", "survived") and (again != 0 or results(folder) != wanted):
            outcome = "lost"
        yield {
            "what": f"files of {limit >> 10} KiB",
            "code": code,
            "outcome": outcome,
            "lines": len(said.splitlines()),
        }


def workers(runs: Runs, numbers: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Kill one of two processes, see the other one end, and start both again."""
    folder = runs.scratch / "two"
    shutil.rmtree(folder, ignore_errors=True)

    def both() -> list[subprocess.Popen[str]]:
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        place = [
            f"--coordinator=localhost:{port}",
            "--num_processes=2",
            "--cpu_devices=1",
            "--heartbeat_timeout=20",
        ]
        return [runs.start(folder, *place, f"--process_id={index}") for index in range(2)]

    for _ in range(count):
        processes, victim = both(), numbers.randrange(2)
        time.sleep(numbers.uniform(20, 60))
        running = processes[victim].poll() is None
        processes[victim].kill()
        began = time.monotonic()
        code = ended(processes[1 - victim])
        seconds = round(time.monotonic() - began, 1)
        outcome = "hung" if code is None else "lost" if code in NOT_AGAIN else "survived"
        what = f"process {victim} of 2" if running else "after the end"
        yield {"what": what, "code": code, "outcome": outcome, "seconds": seconds}
    codes: Sequence[int | None] = []
    for _ in range(MOST_STARTS):
        codes = [ended(process) for process in both()]
        if codes == [0, 0] or any(code in (None, *NOT_AGAIN) for code in codes):
            break
    lines = results(folder)["lines"] if codes == [0, 0] else []
    steps = [line["step"] for line in lines if "evaluation" not in line]
    outcome = "survived" if steps == sorted(set(steps)) and steps[-1:] == [STEPS] else "lost"
    yield {"what": "both again", "code": max(code or 0 for code in codes), "outcome": outcome}


def leaks(runs: Runs, numbers: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Save many checkpoints in one process, and compare memory, threads, handles and disk."""
    import jax
    import jax.numpy as jnp

    from fam_jax.checkpoint import Checkpoints

    folder = runs.scratch / "leaks"
    shutil.rmtree(folder, ignore_errors=True)
    x, key = jnp.zeros((1 << 20,)), jax.random.key(0)

    def use() -> dict[str, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
            "threads": threading.active_count(),
            "handles": len(os.listdir("/proc/self/fd")),
            "files": len(files),
            "disk_kib": sum(path.stat().st_size for path in files) >> 10,
        }

    figures = {}
    with Checkpoints(folder, config={}, keep=2) as checkpoints:
        for step in range(1, count + 1):
            x = x + 1
            checkpoints.save(step, {"params": {"x": x}, "key": key}, {"step": step})
            if step in (count // 5, count):
                checkpoints.wait()
                figures[step] = use()
    (_, first), (_, last) = figures.items()
    grown = {name: last[name] - first[name] for name in first}
    leaked = grown["memory_mib"] > 64 or any(grown[name] > 8 for name in ("threads", "handles", "files"))
    for _ in range(count - 1):
        yield {"what": "checkpoint", "outcome": "survived"}
    outcome = "lost" if leaked or grown["disk_kib"] > 64 else "survived"
    yield {
        "what": "checkpoint",
        "outcome": outcome,
        "figures": {str(step): each for step, each in figures.items()},
    }
