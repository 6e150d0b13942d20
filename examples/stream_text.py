"""Read a text of any length through a model's memory, then continue it in several ways.

    python examples/stream_text.py RUN book.txt "Who did it? " "Where was it hidden? "

RUN is a checkpoint: the workdir of a training run or an imported model.
"""

import argparse
import pathlib

import jax

from fam_jax import TextModel


def main(argv: list[str] | None = None) -> None:
    """Read the text once, and answer every question from the same state."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="checkpoint of the model")
    parser.add_argument("text", type=pathlib.Path, help="UTF-8 text of any length")
    parser.add_argument("questions", nargs="*", default=[""], help="continuations to start with")
    parser.add_argument("--max_tokens", type=int, default=32)
    arguments = parser.parse_args(argv)

    model = TextModel.restore(arguments.run)
    with arguments.text.open("rb") as file:
        state = model.read(file)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.streams))
    print(
        f"read {state.tokens_read:,} tokens into a state of {size:,} bytes, whatever the length of the text"
    )

    # The state is a value. Each question continues it on its own, and the text is not read again.
    for question in arguments.questions:
        asked = model.read(question, state) if question else state
        answer = model.generate(asked, max_tokens=arguments.max_tokens)
        print(f"{question}{answer.text}")

    # Another process can load the state and go on from there.
    memory = arguments.text.with_suffix(".memory")
    model.save(memory, state)
    print(f"saved the state to {memory}: {model.load(memory).tokens_read:,} tokens")


if __name__ == "__main__":
    main()
