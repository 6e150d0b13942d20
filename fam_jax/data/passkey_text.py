"""The sentences of the PassKey task (section 3.2 of the paper; filler of Mohtashami & Jaggi, 2023).

An example consists of STATEMENT, the key, REMEMBER, the key, REPEATED, filler, QUESTION, and the key again, which is
the answer. A space separates the parts, but REMEMBER follows the key directly.
"""

STATEMENT = (
    "Much of this text is irrelevant, but one important fact is hidden in it. Memorise that fact. "
    "The pass key is"
)
REMEMBER = ". Remember it."
REPEATED = "is the pass key."
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def example_text(key: str, filler_cycles: int) -> tuple[str, str]:
    """Return prompt and answer as plain text, with FILLER `filler_cycles` times."""
    statement = f"{STATEMENT} {key}{REMEMBER} {key} {REPEATED}"
    return " ".join([statement, *[FILLER] * filler_cycles, QUESTION]), key
