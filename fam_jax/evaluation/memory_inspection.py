"""What a model's tokens and memory attend to, how its memory changes from block to block, and where gradients reach."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig, ceil_div
from fam_jax.evaluation.documents import DocumentReader
from fam_jax.evaluation.task import OnProgress
from fam_jax.generation.inspection import Inspected, gradient_norms, inspect_block
from fam_jax.model.layer_types import layers_with_memory
from fam_jax.model.memory_health import ALIKE

# Documents whose attention and memory are inspected, and those whose gradients are computed: the longest ones.
INSPECTED = 8
DIFFERENTIATED = 4
# Most tokens of a document through which a gradient is computed.
GRADIENT_TOKENS = 16384
# Most rows and columns of tokens in maps and by place; a larger block is divided into as many groups of tokens.
PLACES = 64


def inspect_documents(reader: DocumentReader, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Read some documents block by block, and return what is seen.

    Returns:
      documents: how many.
      attention: shares of attention, the means of all tokens and documents:
        memory, past, own (L, H): to the memory, past blocks and the own block, which sum to 1.
        memory_at_counted (L, H): to the memory, from the tokens that predict a counted one; None if there are none.
        memory_by_block (N, L), memory_by_place (L, places): to the memory, by block and by place in the block.
        slots (L, S): to each key of the memory; None if no block is complete.
      writing: what the rows of the memory attend to when a block is written; None if they attend to nothing:
        block (L, H): share of the tokens of the block; the rest is the memory's own.
        tokens (L, H): how many tokens share it, from 1 to C: the exponential of the entropy.
      maps: of one document, the means of the heads, tokens in at most 64 groups: `keys` (keys of the memory; the tokens
        come after them), `read` (L, places, keys + places) of its last block, and `write` (L, M, keys + places) of its
        first block, or None, with `write_keys`.
      vectors: what the memory holds; None if there is no memory. See :meth:`MemoryVectors.figures`.
    """
    examples, size = reader.documents.examples, reader.streamer.config.block_size
    batch = sorted(range(len(examples)), key=lambda n: -len(examples[n].ids))[:INSPECTED]
    lengths = np.array([len(examples[n].ids) for n in batch])
    weights = [examples[n].weights for n in batch]
    blocks, state = ceil_div(int(lengths.max()), size), reader.streamer.start(len(batch))
    sums = _Sums(lengths // size)
    for block in range(blocks):
        inputs, _ = reader.tokens(batch, [block] * len(batch), 1)
        found, state = inspect_block(reader.streamer, inputs, state)
        places = block * size + np.arange(size)
        counted = np.zeros((len(batch), size), bool)
        for row, each in enumerate(weights):
            part = each[block * size :][:size] > 0
            counted[row, : len(part)] = part
        sums.add(found, places < lengths[:, None], counted)
        if on_progress is not None:
            on_progress("attention", (block + 1) * size, blocks * size)
    return {"documents": len(batch), **sums.results(reader.streamer.config)}


class _Sums:
    """Sums over the blocks of a batch of documents, the first of which is the longest."""

    def __init__(self, whole_blocks: np.ndarray):
        # (B,) complete blocks of each document.
        self.whole = whole_blocks
        self.shares: dict[str, Any] = {}
        self.tokens = self.counted = self.written = 0
        self.by_block: list[np.ndarray] = []
        self.by_place: Any = 0
        self.place_tokens: Any = 0
        self.write_map: np.ndarray | None = None
        self.vectors = MemoryVectors(whole_blocks)

    def add(self, found: Inspected, real: np.ndarray, counted: np.ndarray) -> None:
        """Add a block, whose `real` and `counted` tokens are (B, C) bool."""
        reading, writing, vectors = found
        block, here = len(self.by_block), real.astype(np.float64)
        full = (block < self.whole).astype(np.float64)
        self._sum("memory", np.einsum("lbch,bc->lh", reading.memory, here))
        self._sum("past", np.einsum("lbch,bc->lh", reading.past, here))
        self._sum("at_counted", np.einsum("lbch,bc->lh", reading.memory, (real & counted).astype(float)))
        # The mean of a block's tokens; for incomplete blocks that of the padding, too, so they are left out.
        self._sum("slots", np.einsum("lbhs,b->ls", reading.slots, full) / reading.slots.shape[2])
        place = np.einsum("lbch,bc->lc", reading.memory, here) / reading.memory.shape[3]
        self.by_block.append(place.sum(axis=1) / here.sum())
        self.by_place, self.place_tokens = self.by_place + place, self.place_tokens + here.sum(axis=0)
        self.tokens += int(real.sum())
        self.counted += int((real & counted).sum())
        self.written += int(full.sum())
        self.read_map, self.map_tokens = reading.weights, int(real[0].sum())
        if writing is not None:
            self._sum("block", np.einsum("lbmh,b->lh", writing.block, full) / writing.block.shape[2])
            self._sum("picked", np.einsum("lbmh,b->lh", writing.tokens, full) / writing.tokens.shape[2])
            self.write_map = writing.weights if self.write_map is None and full[0] else self.write_map
        if vectors is not None:
            self.vectors.add(vectors)

    def _sum(self, name: str, value: np.ndarray) -> None:
        self.shares[name] = self.shares.get(name, 0) + value

    def results(self, config: ModelConfig) -> dict[str, Any]:
        """Return the figures of :func:`inspect_documents`."""
        shares, tokens, size = self.shares, self.tokens, config.block_size
        memory, past = shares["memory"] / tokens, shares["past"] / tokens
        attention = {
            "memory": memory.tolist(),
            "past": past.tolist(),
            "own": (1 - memory - past).tolist(),
            "memory_at_counted": (shares["at_counted"] / self.counted).tolist() if self.counted else None,
            "memory_by_block": np.array(self.by_block).tolist(),
            "memory_by_place": _pooled(
                self.by_place / np.maximum(self.place_tokens, 1), 1, mean=True
            ).tolist(),
            "slots": (shares["slots"] / self.written).tolist() if self.written else None,
        }
        writing = None
        if "block" in shares and self.written:
            writing = {
                "block": (shares["block"] / self.written).tolist(),
                "tokens": (shares["picked"] / self.written).tolist(),
            }
        keys = self.read_map.shape[2] - size
        read = self.read_map[:, : self.map_tokens]
        maps: dict[str, Any] = {
            "keys": keys,
            "read": _map(_pooled(read, 1, mean=True), keys).tolist(),
            "write": None,
        }
        if self.write_map is not None:
            itself = self.write_map.shape[2] - size
            maps |= {"write": _map(self.write_map, itself).tolist(), "write_keys": itself}
        vectors = self.vectors.figures(layers_with_memory(config), config.dtype)
        return {"attention": attention, "writing": writing, "maps": maps, "vectors": vectors}


def _pooled(x: np.ndarray, axis: int, *, mean: bool = False) -> np.ndarray:
    """Return `x` with at most PLACES entries along an axis: sums, or means, of neighbours."""
    width = ceil_div(x.shape[axis], PLACES)
    begins = np.arange(0, x.shape[axis], width)
    sums = np.add.reduceat(x, begins, axis=axis)
    if not mean:
        return sums
    counts = np.diff([*begins, x.shape[axis]])
    return sums / counts.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _map(weights: np.ndarray, keys: int) -> np.ndarray:
    """Return weights (L, rows, keys + C) with the tokens in groups."""
    return np.concatenate([weights[..., :keys], _pooled(weights[..., keys:], weights.ndim - 1)], axis=-1)


class MemoryVectors:
    """What the memories of a batch hold after each block. Keeps a few figures, and the vectors of two blocks."""

    def __init__(self, whole_blocks: np.ndarray):
        """Take the number of complete blocks of each document (B,)."""
        self.whole = whole_blocks
        # After so many blocks documents are compared: all that have a complete block have read them.
        self.last = int(whole_blocks[whole_blocks > 0].min(initial=np.iinfo(np.int32).max))
        # (N, L), and of the last block and the one before (L, B, M, W).
        self.norms: list[np.ndarray] = []
        self.finite: Any = True
        self.end: np.ndarray | None = None
        self.before: np.ndarray | None = None

    def add(self, vectors: np.ndarray) -> None:
        """Add the vectors (L, B, M, W) after the next block."""
        block = len(self.norms) + 1
        reading = self.whole >= block
        if not reading.any():
            return
        going = vectors[:, reading].astype(np.float64)
        self.norms.append(np.sqrt(np.square(going).sum(axis=-1)).mean(axis=(1, 2)))
        self.finite = self.finite & np.isfinite(going).all(axis=(1, 2, 3))
        if block in (self.last - 1, self.last):
            self.before, self.end = self.end, going[:, self.whole[reading] > 0]

    def figures(self, layers: Sequence[int], dtype: str) -> dict[str, Any] | None:
        """Return how large and how different the vectors are, and alarms; None if there are no vectors.

        Args:
          layers: numbers of the layers that have a memory.
          dtype: in which the model computes.

        Returns:
          layers: their numbers; empty if layers share the memory. blocks: after which documents are compared.
          norm (N, L): mean norm of a vector after each block.
          slots_spread (L): how much the vectors of a document differ: their distance from their mean, relative to their
            norm, both as root mean square. 0: they are all alike, 1: their mean is zero. None if there is one vector.
          documents_spread (L): the same between documents, for each vector. None if there is one document.
          change (L): how much the last block changed the memory, relative to its norm; None after the first one.
          alarms: a line for each layer and each of these that shows a collapse.
        """
        if self.end is None:
            return None
        shared = len(self.end) == 1 and len(layers) != 1
        own = [0] if shared else [*layers]
        names = ["shared memory"] if shared else [f"layer {layer}" for layer in layers]
        end, limit = self.end[own], max(ALIKE, float(jnp.finfo(dtype).eps))
        with np.errstate(invalid="ignore"):
            found: dict[str, Any] = {
                "layers": [] if shared else own,
                "blocks": self.last,
                "norm": np.array(self.norms)[:, own].tolist(),
                "slots_spread": _spread(end, 2) if end.shape[2] > 1 else None,
                "documents_spread": _spread(end, 1) if end.shape[1] > 1 else None,
                "change": None if self.before is None else _relative(end - self.before[own], end),
            }
        finite = np.broadcast_to(self.finite, len(self.end))[own]
        return {**found, "alike_below": limit, "alarms": _alarms(found, end, finite, names, limit)}


def _size(x: np.ndarray) -> np.ndarray:
    """Return the root mean square (L,) of (L, B, M, W)."""
    return np.sqrt(np.square(x).mean(axis=(1, 2, 3)))


def _relative(part: np.ndarray, whole: np.ndarray) -> list[float]:
    size = _size(whole)
    return (_size(part) / np.where(size > 0, size, 1)).tolist()


def _spread(vectors: np.ndarray, axis: int) -> list[float]:
    return _relative(vectors - vectors.mean(axis=axis, keepdims=True), vectors)


def _alarms(
    figures: dict[str, Any], end: np.ndarray, finite: np.ndarray, names: Sequence[str], limit: float
) -> list[str]:
    found = []
    for number, name in enumerate(names):
        if not finite[number]:
            found.append(f"{name}: the memory is not finite (NaN or inf)")
            continue
        if not end[number].any():
            found.append(f"{name}: the memory is zero")
            continue
        for key, what in (
            ("slots_spread", "all vectors of the memory are alike"),
            ("documents_spread", "the memories of all documents are alike"),
        ):
            if figures[key] is not None and figures[key][number] < limit:
                found.append(f"{name}: {what} (they differ by {figures[key][number]:.1e} of their norm)")
        if figures["change"] is not None and figures["change"][number] == 0:
            found.append(f"{name}: the memory no longer changes")
    return found


def gradient_reach(reader: DocumentReader, on_progress: OnProgress | None = None) -> dict[str, Any] | None:
    """Return how much the loss of the last block depends on each earlier block.

    Returns:
      documents; blocks, of each, that were read; by_blocks_back: the norm of the gradient of the last block's loss with
      respect to the embeddings of the block so many blocks back, as root mean square over documents. None if no
      document has two blocks, the last of them with a counted token.
    """
    size = reader.streamer.config.block_size
    ends = [_last_counted(each.weights, size) for each in reader.documents.examples]
    chosen = sorted((n for n, end in enumerate(ends) if end > 1), key=lambda n: -ends[n])[:DIFFERENTIATED]
    if not chosen:
        return None
    count = max(2, min(min(ends[n] for n in chosen), GRADIENT_TOKENS // size))
    norms = []
    for number, document in enumerate(chosen):
        end = ends[document]
        inputs, targets = reader.tokens([document], [end - count], count)
        weights = np.zeros(size, np.float32)
        last = reader.documents.examples[document].weights[(end - 1) * size : end * size]
        weights[: len(last)] = last > 0
        norms.append(gradient_norms(reader.streamer, inputs, targets[:, -size:], weights[None])[0])
        if on_progress is not None:
            on_progress("gradients", (number + 1) * count * size, len(chosen) * count * size)
    mean = np.sqrt(np.square(np.array(norms, np.float64)).mean(axis=0))
    return {"documents": len(chosen), "blocks": count, "by_blocks_back": mean[::-1].tolist()}


def _last_counted(weights: np.ndarray, size: int) -> int:
    """Return the number of blocks up to the last counted token."""
    places = np.flatnonzero(weights > 0)
    return int(places[-1]) // size + 1 if len(places) else 0
