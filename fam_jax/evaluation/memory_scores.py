"""Scores of documents with the memory taken away: zeroed, shuffled, frozen, stopped, or cut to some past blocks.

Every way is compared with the intact model on the same tokens, document by document. All ways read block by block in
batches of one size, that is by the same program, so the difference of a model that ignores its memory is exactly 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fam_jax.config import ceil_div
from fam_jax.evaluation.documents import AfterBlock, DocumentReader, Excerpt, Scores, ablation
from fam_jax.evaluation.paired import difference_per_token
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState, ablated

# Most excerpts of a document for one length of context, spread over the document.
EXCERPTS = 16
WAYS = {
    "zeroed": "the memory is zero after every block",
    "shuffled": "the memory is that of another document",
    "frozen": "the memory is never written",
    "stopped": "the memory is not written after the middle of the document",
    "window": "only the blocks that the window shows are read",
}


def memory_scores(reader: DocumentReader, intact: Sequence[Scores]) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure the model in every way of `WAYS`.

    Args:
      reader: the model and its documents.
      intact: the scores of the model as it is, read block by block.

    Returns:
      By name ("intact", and the ways): documents, tokens, loss, accuracy, exact_match (None unless documents are
      answers) and, except for "intact", `intact_loss` of the same tokens, and `difference` and `accuracy_difference`:
      mean per token, low, high. And why ways were left out.
    """
    config, skipped = reader.streamer.config, {}
    found = {"intact": _figures(reader, intact, [0] * len(intact))}
    changes: dict[str, AfterBlock] = {}
    if config.memory.has_state:
        changes = {how: ablation(reader.streamer, how) for how in ("zeroed", "shuffled", "frozen")}
        changes["stopped"] = _stopped(reader.streamer, [_middle(reader, n) for n in range(len(intact))])
        if reader.rows < 2:
            del changes["shuffled"]
            skipped["shuffled"] = "needs two documents in a batch, to swap their memories"
    else:
        skipped |= {name: "the model has no memory beside its window" for name in WAYS if name != "window"}
    for name, change in changes.items():
        changed = reader.read_by_block(name, change)
        begins = [_middle(reader, n) if name == "stopped" else 1 for n in range(len(intact))]
        add_comparison(found, name, reader, intact, changed, begins)
    segments = config.memory_segments
    excerpts = [each for n in range(len(intact)) for each in excerpts_of(reader, n, segments, 1)]
    if excerpts:
        changed = reader.read_excerpts("window", excerpts)
        add_comparison(found, "window", reader, intact, changed, [0] * len(intact))
    skipped |= {name: "no document is long enough" for name in WAYS if name not in found | skipped}
    return found, skipped


def retention(reader: DocumentReader, intact: Sequence[Scores]) -> list[dict[str, Any]]:
    """Measure what the model still uses from further back than 1, 2, 4 and so on blocks.

    Returns:
      For each distance: `blocks` and `most_blocks` (fewest and most past blocks that a scored token knows of), and the
      figures of :func:`memory_scores`. The difference is to the model that knows of all blocks.
    """
    found: list[dict[str, Any]] = []
    longest, blocks = max(reader.blocks(n) for n in range(len(intact))), 1
    while blocks < longest:
        width = ceil_div(blocks, 4)
        excerpts = [each for n in range(len(intact)) for each in excerpts_of(reader, n, blocks, width)]
        if excerpts:
            changed = reader.read_excerpts(f"{blocks} blocks back", excerpts)
            entry: dict[str, Any] = {}
            add_comparison(entry, "found", reader, intact, changed, [0] * len(intact))
            if entry:
                most = max(each.end - 1 - each.begin for each in excerpts)
                found.append({"blocks": blocks, "most_blocks": most, **entry["found"]})
        blocks *= 2
    return found


def excerpts_of(reader: DocumentReader, document: int, past: int, width: int) -> list[Excerpt]:
    """Return excerpts that score at most `width` blocks each, the first of them after exactly `past` blocks.

    They are counted from the end of the document. All leave out something: none begins at the first block. Those
    without a token to count are not there.
    """
    size = reader.streamer.config.block_size
    counted = np.flatnonzero(reader.documents.examples[document].weights > 0) // size
    found = []
    for end in range(reader.blocks(document), past + 1, -width):
        scored = max(end - width, past + 1)
        if ((counted >= scored) & (counted < end)).any():
            found.append(Excerpt(document, scored - past, scored, end))
    if len(found) > EXCERPTS:
        found = [found[place] for place in np.linspace(0, len(found) - 1, EXCERPTS).round().astype(int)]
    return found


def _middle(reader: DocumentReader, document: int) -> int:
    """Return the number of blocks after which the memory of a document is stopped: half of them, at least 1."""
    return max(1, reader.blocks(document) // 2)


def _stopped(streamer: Streamer, places: Sequence[int]) -> AfterBlock:
    """Return what keeps the memory of each document as it was after its first `places` blocks."""
    kept: list[StreamState] = []

    def after_block(state: StreamState, start: StreamState, blocks: int, batch: Sequence[int]) -> StreamState:
        place = np.array([places[document] for document in batch])
        if blocks == 1:
            kept[:] = [state]
        kept[0] = state.choose(place == blocks, kept[0])
        return ablated(streamer.config, state, kept[0], "frozen").choose(place < blocks, state)

    return after_block


def add_comparison(
    found: dict[str, Any],
    name: str,
    reader: DocumentReader,
    intact: Sequence[Scores],
    changed: Sequence[Scores],
    begins: Sequence[int],
) -> None:
    """Add the figures of a way, from block `begins` of each document on, if there are tokens to compare."""
    figures = _figures(reader, changed, begins)
    if not figures["tokens"]:
        return
    chosen = [_counted(reader, scores, begin) for scores, begin in zip(changed, begins, strict=True)]
    tokens = np.array([len(places) for places in chosen])

    def difference(field: str) -> dict[str, float | None]:
        sums = [
            (getattr(new, field)[places].astype(np.float64) - getattr(old, field)[places]).sum()
            for old, new, places in zip(intact, changed, chosen, strict=True)
        ]
        return difference_per_token(np.array(sums), tokens)._asdict()

    same = [each._replace(counted=scores.counted) for each, scores in zip(intact, changed, strict=True)]
    found[name] = {
        **figures,
        "intact_loss": _figures(reader, same, begins)["loss"],
        "difference": difference("nats"),
        "accuracy_difference": difference("correct"),
    }


def _counted(reader: DocumentReader, scores: Scores, begin: int) -> np.ndarray:
    """Return the places of the counted tokens from block `begin` on."""
    places = np.flatnonzero(scores.counted)
    return places[places >= begin * reader.streamer.config.block_size]


def _figures(reader: DocumentReader, scores: Sequence[Scores], begins: Sequence[int]) -> dict[str, Any]:
    chosen = [_counted(reader, each, begin) for each, begin in zip(scores, begins, strict=True)]
    pairs = [(each, places) for each, places in zip(scores, chosen, strict=True) if len(places)]
    if not pairs:
        return {"documents": 0, "tokens": 0, "loss": None, "accuracy": None, "exact_match": None}
    nats = np.concatenate([each.nats[places] for each, places in pairs])
    right = [each.correct[places] for each, places in pairs]
    whole = float(np.mean([each.all() for each in right])) if reader.documents.answers else None
    return {
        "documents": len(pairs),
        "tokens": len(nats),
        "loss": float(nats.mean(dtype=np.float64)),
        "accuracy": float(np.concatenate(right).mean()),
        "exact_match": whole,
    }
