"""The sentences of the PassKey task (section 3.2 of the paper; filler of Mohtashami & Jaggi, 2023).

An example reads STATEMENT, the key, REMEMBER, the key, REPEATED, filler, QUESTION, the key: the last key is
the answer. Every part but the first follows a space.
"""

STATEMENT = (
    "Much of this text is irrelevant, but one important fact is hidden in it. Memorise that fact. "
    "The pass key is"
)
REMEMBER = ". Remember it."  # follows the key directly
REPEATED = "is the pass key."
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def example_text(key: str, filler_cycles: int) -> tuple[str, str]:
    """Prompt and answer in plain text, with FILLER `filler_cycles` times."""
    statement = f"{STATEMENT} {key}{REMEMBER} {key} {REPEATED}"
    return " ".join([statement, *[FILLER] * filler_cycles, QUESTION]), key
