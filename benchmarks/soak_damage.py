"""Trials of `benchmarks.soak` with damaged files: checkpoints, configs, vocabularies, memories and exports."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.soak_processes import Runs
from fam_jax.checkpoint import load_params, read_config
from fam_jax.config import UserError, resolve


class Target(NamedTuple):
    """Something to damage, and what reads it."""

    # A file, or a folder of files.
    path: Path
    # Returns all that counts of what is read, as arrays and JSON values.
    read: Callable[[], Any]


def damages(runs: Runs, numbers: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Damage one file at a time, and read it: the damage is noticed, or nothing of what is read has changed."""
    targets = make_targets(runs)
    wanted = {name: target.read() for name, target in targets.items()}
    for _ in range(count):
        name = numbers.choice(list(targets))
        target = targets[name]
        files = (
            [target.path]
            if target.path.is_file()
            else sorted(p for p in target.path.rglob("*") if p.is_file())
        )
        file = numbers.choice(files)
        original = file.read_bytes()
        how, changed = damage(original, numbers)
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        try:
            outcome = "harmless" if same(target.read(), wanted[name]) else "silent"
        except UserError as error:
            outcome = "noticed" if str(error).strip() else "traceback"
        except Exception as error:  # what a user would see as a traceback
            outcome, how = "traceback", f"{how}: {type(error).__name__}: {str(error)[:200]}"
        finally:
            file.write_bytes(original)
        yield {"what": name, "file": file.name, "how": how, "outcome": outcome}


def damage(content: bytes, numbers: random.Random) -> tuple[str, bytes | None]:
    """Return a kind of damage and the damaged content; None: the file is gone."""
    place = numbers.randrange(max(len(content), 1))
    size = numbers.choice([1, 16, 512, 4096])
    kinds: dict[str, Callable[[], bytes | None]] = {
        "bit": lambda: content[:place] + bytes(b ^ 1 << numbers.randrange(8) for b in content[place : place + 1])
        + content[place + 1 :],
        "byte": lambda: content[:place] + numbers.randbytes(1) + content[place + 1 :],
        "cut": lambda: content[:place] + content[place + size :],
        "truncated": lambda: content[:place],
        "zeros": lambda: content[:place] + bytes(len(content[place : place + size])) + content[place + size :],
        "appended": lambda: content + numbers.randbytes(size),
        "swapped": lambda: content[place:] + content[:place],
        "empty": lambda: b"",
        "gone": lambda: None,
    }  # fmt: skip
    how = numbers.choice(list(kinds))
    return how, kinds[how]()


def same(found: Any, wanted: Any) -> bool:
    """Return whether two trees of arrays and values are equal bit for bit."""
    one_tree, other_tree = (jax.tree.leaves_with_path(each) for each in (found, wanted))
    if [path for path, _ in one_tree] != [path for path, _ in other_tree]:
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)


def make_targets(runs: Runs) -> dict[str, Target]:
    """Train a run with a vocabulary of its own, save a memory, export the model; return what can be damaged."""
    from fam_jax.data.text_vocabulary import train_text_vocabulary
    from fam_jax.data.vocabulary import load_vocabulary
    from fam_jax.generation.text import TextModel
    from fam_jax.hf import Folder, export_model, import_parameters
    from fam_jax.hf.importing import imported_config

    folder, vocabulary = runs.workdir / "damaged", runs.workdir / "books.model"
    texts = [path.read_text() for path in sorted((runs.workdir / "train").iterdir())]
    if not vocabulary.exists():
        vocabulary.write_bytes(train_text_vocabulary(texts, 300, threads=1))
    own = [
        f"--config.data.vocabulary={vocabulary}",
        "--config.model.vocab_size=384",
        "--config.train.steps=8",
    ]
    if runs.start(folder, *own, "--config.evaluate.every=0").wait() != 0:
        raise RuntimeError(f"the run to damage failed; see {folder.with_suffix('.log')}")
    vocabulary.unlink()  # the run has a copy
    model = TextModel.restore(folder)
    memory, exported = runs.scratch / "memory", runs.scratch / "exported"
    model.save(memory, model.read(texts[0]))
    shutil.rmtree(exported, ignore_errors=True)
    export_model(folder, exported)

    def read_export() -> Any:
        opened = Folder(exported)
        config = imported_config(opened)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return import_parameters(opened, config.model, lambda shapes: dict.fromkeys(shapes, device))

    def read_vocabulary() -> Any:
        return TextModel.restore(folder).vocabulary.encode(texts[1])

    def read_run() -> Any:
        config = resolve(read_config(folder))
        load_vocabulary("bytes")
        return json.loads(json.dumps([str(config)]))

    return {
        "checkpoint": Target(folder / "8", lambda: load_params(folder, 8)[0]),
        "config": Target(folder / "config.json", read_run),
        "vocabulary": Target(folder / "vocabulary" / "books.model", read_vocabulary),
        "memory": Target(memory, lambda: jax.tree.map(np.asarray, model.load(memory).streams)),
        "export": Target(exported, read_export),
    }
