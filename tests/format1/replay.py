"""Continue runs of version 0.1 (format 1) in the current folder, and print the results as JSON.

This is a separate program because the runs were made on one device and the tests have eight.
"""

import json
from pathlib import Path
from typing import Any

from fam_jax.checkpoint import read_config
from fam_jax.config import resolve
from fam_jax.evaluation import evaluate
from fam_jax.generation.sampling import Sampling
from fam_jax.generation.text import TextModel
from fam_jax.training.loop import train


def answer(model: TextModel, state: Any) -> str:
    """Generate an answer with the settings of the recorded answers."""
    asked = model.read("Where is Ada?", state)
    return model.generate(asked, max_tokens=24, sampling=Sampling(temperature=1.0), seed=1).text


def main() -> None:
    """Generate from steps that format 1 saved, evaluate them, then resume each run."""
    found: dict[str, Any] = {"answers": {}, "metrics": {}, "scalars": {}}
    document = Path("heldout.txt").read_text()
    for run, step in (("text", 4), ("lora", 2)):
        model = TextModel.restore(run, step)
        found["answers"][run] = answer(model, model.read(document))
        if run == "text":
            found["answers"]["memory"] = answer(model, model.load("heldout.memory"))
    results = (
        evaluate("text", step=4, files=["heldout.txt"], ablations=("zeroed", "frozen")),
        evaluate("passkey", step=4, filler_blocks=(2, 4), keys=4),
    )
    found["scalars"] = {result.task: result.scalars for result in results}
    for run in ("text", "lora", "passkey"):
        train(resolve(read_config(run)), run, quiet=True)
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        found["metrics"][run] = {line["step"]: line for line in lines}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
