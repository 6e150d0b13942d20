"""Trains the SentencePiece model that ships as `assets/passkey.model`.

    python -m fam_jax.data.train_vocabulary --out passkey.model

Every word of the PassKey task is one piece, and so is every digit and punctuation mark; a number is a
space and its digits. There are no pieces for anything else: other text becomes <unk>.
"""

import argparse
import io
import re
import sys
import tempfile
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from fam_jax.config import UserError
from fam_jax.data.passkey_text import example_text

DIGITS = "0123456789"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space


def train() -> bytes:
    """The serialised model; the same bytes on every call."""
    prompt, answer = example_text(DIGITS, filler_cycles=1)
    text = f"{prompt} {answer}"
    words = dict.fromkeys(re.findall(r"[^\W\d]+", text))  # a dict keeps the order of first use
    marks = dict.fromkeys(re.findall(r"[^\w\s]", text))
    pieces = [*(SPACE + word for word in words), *marks, *DIGITS]
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        # The usual rules for Unicode would be 240 KB of the model; with none, every loading logs a line.
        rules.write("A0\t20\n")  # no-break space to space
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text]),
            model_writer=model,
            user_defined_symbols=pieces,
            vocab_size=len(pieces) + 4,  # padding, end, unknown, and the space before a number
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            split_digits=True,
            normalization_rule_tsv=rules.name,
            num_threads=1,
            minloglevel=2,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # the temporary name, other on every run
    return proto.SerializeToString(deterministic=True)


def main(arguments: list[str] | None = None) -> int:
    """Trains the model and writes it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train the SentencePiece model of the PassKey task.")
    parser.add_argument("--out", type=Path, required=True, help="file to write the model to")
    out: Path = parser.parse_args(arguments).out
    try:
        out.write_bytes(train())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
