"""Train the SentencePiece model that ships as `assets/passkey.model`.

    python -m fam_jax.data.passkey_vocabulary --out passkey.model

Every word of the PassKey task is one piece, and so is every digit and punctuation mark. A number is encoded as a space
and its digits. All other text becomes <unk>.
"""

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from fam_jax.config import UserError
from fam_jax.data.passkey_text import example_text

DIGITS = "0123456789"
# How SentencePiece writes a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def train() -> bytes:
    """Return the serialized model; it has the same bytes on every call."""
    prompt, answer = example_text(DIGITS, filler_cycles=1)
    text = f"{prompt} {answer}"
    # A dict keeps the order of first use.
    words = dict.fromkeys(re.findall(r"[^\W\d]+", text))
    marks = dict.fromkeys(re.findall(r"[^\w\s]", text))
    pieces = [*(SPACE + word for word in words), *marks, *DIGITS]
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        # A no-break space becomes a space. The default Unicode rules would add 240 KB to the model; without any rule,
        # loading the model would log a line.
        rules.write("A0\t20\n")
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text]),
            model_writer=model,
            user_defined_symbols=pieces,
            # Padding, end, unknown, and the space before a number.
            vocab_size=len(pieces) + 4,
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
    # The name of a temporary file, which differs between runs.
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the model and write it; return the exit code.

    Raises:
      UserError: the file cannot be written.
    """
    parser = argparse.ArgumentParser(description="Train the SentencePiece model of the PassKey task.")
    parser.add_argument("--out", type=Path, required=True, help="where to write the model")
    out: Path = parser.parse_args(argv).out
    try:
        out.write_bytes(train())
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); name another file") from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
