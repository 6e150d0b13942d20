"""TransformerFAM in PyTorch: a decoder whose layers remember what has left their window.

A text is read in blocks of C tokens. In every layer, a token attends to

    the last m blocks   Block Sliding Window Attention (section 2.1 of the paper),
    the layer's FAM     Feedback Attention Memory, M vectors (section 2.2),
    its own block       causally.

When a block is complete, FAM attends to itself and to the whole block and passes through the rest of the layer. The
next block sees the result. The layer's own weights do all of this: the memory adds the initial FAM only.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    cache = None
    for ids in book:  # (B, T) each, T as you like
        cache = model(ids, past_key_values=cache, logits_to_keep=1).past_key_values
    answer = model.generate(question, past_key_values=cache, max_new_tokens=32)

Dongseong Hwang et al., "TransformerFAM: Feedback attention is working memory", arXiv:2404.09173 (2024).

Letters in shapes: B rows, T tokens, W tokens of a piece that lies within a block, S = (m + 1) * C slots of the window,
N = R * M vectors of the last R FAMs, D width, H query heads, K key/value heads, hd width of a head.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class FamConfig(PretrainedConfig):
    """The fields of `config.json`: those of the base model (Llama, Qwen, Gemma), its options spelled out, the memory.

    qkv_bias, qk_norm       biases of queries, keys and values; RMSNorm of queries and keys
    post_norms, norm_offset norms after attention and feed-forward too; the scale of a norm is 1 + its weight
    scale_embeddings        embeddings are multiplied by sqrt(D)

    block_size              C
    memory.segments         m, past blocks that a token sees
    memory.window           tokens that a token sees within these blocks; 0: all
    memory.stop_gradient    gradients stop at past blocks
    memory.length           M; without it there is no FAM
    memory.init             initial FAM. prompt: vectors that rise through the layers. prefix: vectors of each layer
    memory.positions        of FAM. last: of the M tokens before the block. float: just before it. zero: at the start
    memory.previous_blocks  R
    memory.bound            largest root mean square with which FAM is added to its update; 0: no bound

    Layers of the type sliding_attention see `sliding_window` tokens and have no FAM.
    """

    model_type = "fam"
    # Options that only some base models have.
    layer_types = sliding_window = query_pre_attn_scalar = None
    attn_logit_softcapping = final_logit_softcapping = None


class LayerState(NamedTuple):
    """What a layer carries from piece to piece. Keys are not rotated: their positions follow from where they stand."""

    keys: Tensor  # (B, S, K, hd) of the last m blocks, oldest first, then of the unfinished block
    values: Tensor  # (B, S, K, hd)
    fam: Tensor  # (B, M, D), float32 or wider: it adds to itself at every block
    fam_keys: Tensor  # (B, N, K, hd) of the last R FAMs, newest first
    fam_values: Tensor  # (B, N, K, hd)


@dataclasses.dataclass
class FamCache:
    """The state of B streams of text, passed as `past_key_values`. Its size does not depend on how much was read.

    It is a value: the model returns a new one and leaves the old one as it is, to be continued in another way.
    """

    layers: list[LayerState]
    blocks: Tensor  # (B,) complete blocks read; on the CPU, like the next
    filled: Tensor  # (B,) tokens of the unfinished block
    is_compileable = is_croppable = False  # `generate` asks

    def select(self, rows: Tensor) -> "FamCache":
        """Return the state of the streams `rows`, in that order; a stream may be taken more than once."""
        layers = [LayerState(*(x[rows.to(x.device)] for x in layer)) for layer in self.layers]
        return FamCache(layers, self.blocks[rows.cpu()], self.filled[rows.cpu()])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: how many tokens of the past `generate` expects to be passed again before the new ones."""
        return 0


class Rotation(NamedTuple):
    """Cosines and sines (..., 1, hd / 2) of rotary position embedding (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (..., heads, hd); features i and i + hd / 2 are a pair."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).to(x)


def rotation_at(positions: Tensor, layer: "DecoderLayer", device: torch.device) -> Rotation:
    """Return the rotation in a layer at positions (...) on the CPU. Angles are float64, so no position is too large."""
    config, rope = layer.config, layer.config.rope_parameters
    rope = rope.get(layer.layer_type, rope)
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = rope["rope_theta"] ** (-index / config.head_dim)  # radians per position
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":  # only long wavelengths are stretched
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / rope["factor"])
    angles = positions.double()[..., None, None] * frequencies
    return Rotation(*(x.to(device, torch.float32) for x in (angles.cos(), angles.sin())))


class Piece(NamedTuple):
    """What the layers of one type need to know about a piece. Position 0 is the first token of the piece's block."""

    tokens: Rotation  # (B, W, 1, hd / 2)
    window: Rotation  # (S, 1, hd / 2)
    fams: Rotation  # (B, N, 1, hd / 2)
    mask: Tensor  # (B, 1, W, N + S), true where a token sees a key
    written: tuple[Tensor, Tensor, Tensor]  # row, place in the piece and slot in the window of each token
    complete: Tensor | None  # (B,) bool, the rows whose block the piece completes; None: no row's
    has_read: Tensor  # (B,) bool, the rows whose FAM has read a block


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, width: int, config: FamConfig):
        super().__init__()
        self.epsilon, self.offset = config.rms_norm_eps, float(config.norm_offset)
        self.weight = nn.Parameter(torch.ones(width) - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width)."""
        wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * (self.offset + self.weight.float())).to(x)


class InitialFam(nn.Module):
    """Learned vectors (M, D) that FAM starts from."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.initial_fam = nn.Parameter(torch.randn(length, width) * width**-0.5)


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer. The same weights serve tokens and FAM."""

    def __init__(self, config: FamConfig, layer_type: str):
        super().__init__()
        width, hd, ff_width = config.hidden_size, config.head_dim, config.intermediate_size
        q_width, kv_width = config.num_attention_heads * hd, config.num_key_value_heads * hd
        self.config, self.layer_type = config, layer_type
        length = config.memory.get("length", 0)
        is_global = layer_type == "full_attention"
        self.length = length if is_global else 0
        self.window = config.memory["window"] if is_global else config.sliding_window
        self.self_attn = nn.ModuleDict({"o_proj": nn.Linear(q_width, width, bias=False)})
        for name, out_width in (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)):
            self.self_attn[name] = nn.Linear(width, out_width, bias=config.qkv_bias)
        if config.qk_norm:
            self.self_attn.update({"q_norm": Norm(hd, config), "k_norm": Norm(hd, config)})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(ff_width, width, bias=False)})
        for name in ("gate_proj", "up_proj"):
            self.mlp[name] = nn.Linear(width, ff_width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = Norm(width, config), Norm(width, config)
        if config.post_norms:
            self.pre_feedforward_layernorm = Norm(width, config)
            self.post_feedforward_layernorm = Norm(width, config)
        self.memory = InitialFam(length, width) if length and config.memory["init"] == "prefix" else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, hd), keys and values (B, T, K, hd) of x (B, T, D), not rotated."""
        x, attention = self.input_layernorm(x).to(self.input_layernorm.weight), self.self_attn
        q, k, v = (attention[f"{name}_proj"](x).unflatten(-1, (-1, self.config.head_dim)) for name in "qkv")
        if self.config.qk_norm:
            q, k = attention["q_norm"](q), attention["k_norm"](k)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what queries (B, T, H, hd) read from (B, S, K, hd) where mask (B, 1, T, S) is true: (B, T, H * hd)."""
        scale = (self.config.query_pre_attn_scalar or self.config.head_dim) ** -0.5
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if (cap := self.config.attn_logit_softcapping) is None:
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = cap * torch.tanh((q @ k.transpose(-1, -2)).float() * scale / cap)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            out = scores.softmax(-1).to(v) @ v
        return out.transpose(1, 2).flatten(2)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Return the layer's output (B, T, D): output projection and gated feed-forward, each with its residual."""
        config, mlp = self.config, self.mlp
        x = self.self_attn["o_proj"](attended)
        x = residual + (self.post_attention_layernorm(x) if config.post_norms else x)
        norm = self.pre_feedforward_layernorm if config.post_norms else self.post_attention_layernorm
        h = norm(x).to(attended)
        gate = mlp["gate_proj"](h)
        gate = F.silu(gate) if config.hidden_act == "silu" else F.gelu(gate, approximate="tanh")
        h = mlp["down_proj"](gate * mlp["up_proj"](h))
        return x + (self.post_feedforward_layernorm(h) if config.post_norms else h)

    def forward(self, x: Tensor, state: LayerState, piece: Piece) -> tuple[Tensor, LayerState]:
        """Read a piece (B, W, D), and close the block of the rows that complete theirs."""
        q, k, v = self.project(x)
        row, place, slot = piece.written
        keys = state.keys.index_put((row, slot), k[row, place])
        values = state.values.index_put((row, slot), v[row, place])
        seen_keys = torch.cat([piece.fams(state.fam_keys), piece.window(keys)], dim=1)
        seen_values = torch.cat([state.fam_values, values], dim=1)
        x = self.finish(self.attend(piece.tokens(q), seen_keys, seen_values, piece.mask), x)
        state = state._replace(keys=keys, values=values)
        if piece.complete is None:
            return x, state
        closed = self.close_block(state, seen_keys, seen_values, piece)
        rows = (piece.complete.view(-1, *[1] * (new.ndim - 1)) for new in closed)
        return x, LayerState(*map(torch.where, rows, closed, state))

    def close_block(self, state: LayerState, keys: Tensor, values: Tensor, piece: Piece) -> LayerState:
        """Update FAM from the block (algorithm 2), given all keys and values, rotated. Move the window by a block."""
        size, length = self.config.block_size, self.length
        # The oldest block moves to where the next one is written, and is hidden until then.
        past = state[:2] if not self.config.memory["stop_gradient"] else (x.detach() for x in state[:2])
        past = (x.roll(-size, dims=1) for x in past)
        if not length:
            return LayerState(*past, *state[2:])
        q, _, _ = self.project(state.fam)
        q = Rotation(*(x[:, :length] for x in piece.fams))(q)
        keys, values = (torch.cat([x[:, :length], x[:, -size:]], dim=1) for x in (keys, values))
        # The initial FAM carries no context, so its update has no residual (appendix B.1).
        residual = state.fam * piece.has_read[:, None, None]
        if bound := self.config.memory.get("bound"):
            residual = residual * bound * residual.square().mean(-1, keepdim=True).clamp(min=bound**2).rsqrt()
        fam = self.finish(self.attend(q, keys, values), residual)
        fresh = self.project(fam)[1:]
        older = (x[:, : x.shape[1] - length] for x in state[3:])
        return LayerState(*past, fam, *(torch.cat(pair, dim=1) for pair in zip(fresh, older, strict=True)))


class FamModel(nn.Module):
    """The decoder, up to the projection to the vocabulary."""

    def __init__(self, config: FamConfig):
        super().__init__()
        self.config, length, width = config, config.memory.get("length", 0), config.hidden_size
        types = config.layer_types or ["full_attention"] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(DecoderLayer(config, layer_type) for layer_type in types)
        self.norm = Norm(width, config)
        self.previous = config.memory.get("previous_blocks", 1)
        self.memory = InitialFam(length, width) if length and config.memory["init"] == "prompt" else None

    def start(self, rows: int) -> FamCache:
        """Return the state of streams that have read nothing: empty windows, and the initial FAM of each layer."""
        config, weight, layers = self.config, self.embed_tokens.weight, []
        heads = config.num_key_value_heads, config.head_dim
        empty = weight.new_zeros(rows, (config.memory["segments"] + 1) * config.block_size, *heads)
        none_read = torch.zeros(rows, dtype=torch.long, device="cpu")
        wide = torch.promote_types(weight.dtype, torch.float32)
        prompt = weight.new_zeros(1, 0, config.hidden_size, dtype=wide)
        if self.memory is not None:
            prompt = self.memory.initial_fam[None].to(wide)
        for layer in self.layers:
            fam = prompt if layer.memory is None else layer.memory.initial_fam[None].to(wide)
            q, k, v = layer.project(fam)
            if layer.memory is None:  # the prompt rises, and sees only itself (appendix B.1)
                positions = self.fam_positions(fam.shape[1], none_read[:1])[:, : fam.shape[1]]
                rotation = rotation_at(positions, layer, weight.device)
                prompt = layer.finish(layer.attend(rotation(q), rotation(k), v), fam)
            older = weight.new_zeros(rows, (self.previous - 1) * layer.length, *heads)
            fams = (torch.cat([x[:, : layer.length].expand(rows, -1, -1, -1), older], dim=1) for x in (k, v))
            layers.append(LayerState(empty, empty, fam[:, : layer.length].expand(rows, -1, -1), *fams))
        return FamCache(layers, none_read, none_read)

    def fam_positions(self, length: int, blocks: Tensor) -> Tensor:
        """Return the positions (B, N) of the last R FAMs after so many `blocks` (B,) of a stream (appendix B.2.1)."""
        kind, size = self.config.memory.get("positions"), self.config.block_size
        if kind == "zero":
            return (-size * blocks[:, None]).expand(-1, self.previous * length)
        index = torch.arange(length, dtype=torch.float64, device="cpu")
        newest = index - length if kind == "last" else (index + 1) / (length + 1) - 1
        positions = newest - size * torch.arange(self.previous, device="cpu")[:, None]
        return positions.flatten().expand(len(blocks), -1)

    def forward(self, input_ids: Tensor, real: Tensor, cache: FamCache) -> tuple[Tensor, FamCache]:
        """Read those tokens (B, T) that are `real`, block by block. Return activations (B, T, D) and the state."""
        order = real.logical_not().long().argsort(dim=1, stable=True)  # real tokens first
        total, read = real.sum(dim=1), torch.zeros_like(cache.filled)
        index = torch.arange(self.config.block_size, device="cpu")
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.hidden_size**0.5).to(x)
        out = torch.zeros_like(x)
        while (read < total).any():
            count = torch.minimum(total - read, self.config.block_size - cache.filled)
            row, place = (index < count[:, None]).nonzero(as_tuple=True)
            source = order[row, read[row] + place]
            piece = x.new_zeros(len(x), int(count.max()), x.shape[2]).index_put((row, place), x[row, source])
            piece, cache = self.read_piece(piece, row, place, cache)
            out[row, source] = piece[row, place]
            read = read + count
        return self.norm(out), cache

    def read_piece(self, x: Tensor, row: Tensor, place: Tensor, cache: FamCache) -> tuple[Tensor, FamCache]:
        """Read x (B, W, D), whose tokens stand at (row, place), none of them beyond the end of its row's block."""
        size, past, device = self.config.block_size, self.config.memory["segments"], x.device
        tokens = cache.filled[:, None] + torch.arange(x.shape[1], device="cpu")
        window = torch.arange(-past * size, size, device="cpu")
        written = tuple(index.to(device) for index in (row, place, past * size + tokens[row, place]))
        filled = cache.filled + row.bincount(minlength=len(x))
        pieces, layers = {}, []
        for layer_type, layer in {layer.layer_type: layer for layer in self.layers}.items():
            fams = self.fam_positions(layer.length, cache.blocks)
            pieces[layer_type] = Piece(
                *(rotation_at(positions, layer, device) for positions in (tokens, window, fams)),
                mask=self.mask(layer, *(at.to(device) for at in (tokens, window, cache.blocks))),
                written=written,
                complete=(filled == size).to(device) if (filled == size).any() else None,
                has_read=(cache.blocks > 0).to(device),
            )
        for layer, state in zip(self.layers, cache.layers, strict=True):
            x, state = layer(x, state, pieces[layer.layer_type])
            layers.append(state)
        return x, FamCache(layers, cache.blocks + filled // size, filled % size)

    def mask(self, layer: DecoderLayer, tokens: Tensor, window: Tensor, blocks: Tensor) -> Tensor:
        """Return what tokens at (B, W) see of FAM and window (S,) after `blocks` (B,) of a stream: (B, 1, W, N + S)."""
        blocks, distance = blocks[:, None, None], tokens[:, :, None] - window
        seen = (distance >= 0) & (distance < (layer.window or math.inf))
        seen &= window >= -self.config.block_size * blocks
        age = torch.arange(self.previous, device=tokens.device).repeat_interleave(layer.length)
        return torch.cat([(age <= blocks).expand(-1, tokens.shape[1], -1), seen], dim=-1)[:, None]


class FamForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that reads and writes streams of text, through a :class:`FamCache`."""

    config_class = FamConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a token that was read cannot be taken back

    def __init__(self, config: FamConfig):
        super().__init__(config)
        self.model = FamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: FamCache | None = None,
        use_cache: bool = True,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Read tokens; return the logits (B, T, V) of those that follow, and the state.

        Args:
          input_ids: (B, T) new tokens only: those read before are in the state.
          attention_mask: (B, T or more), of which the last T columns count. 0: padding, which leaves no trace.
          past_key_values: of B streams to continue, which stays valid; None starts new ones.
          use_cache: return the state.
          labels: (B, T) like input_ids, -100 where a token does not count; they give a loss.
          logits_to_keep: return logits of so many last tokens only; 0: of all.
        """
        cache = self.model.start(len(input_ids)) if past_key_values is None else past_key_values
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask[:, -input_ids.shape[1] :]
        if real.shape != input_ids.shape or len(cache.blocks) != len(input_ids):
            raise ValueError(f"expected past_key_values of {len(input_ids)} streams, attention_mask (B, T)")
        hidden, cache = self.model(input_ids, real.bool().cpu(), cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:]).float()
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _prepare_cache_for_generation(self, *_: object, **__: object) -> None:
        """Leave `generate` without a cache of its own kinds: it goes on with those that :meth:`forward` returns."""

    def _reorder_cache(self, past_key_values: FamCache, beam_idx: Tensor) -> FamCache:
        """Return the state of the beams that beam search goes on with."""
        return past_key_values.select(beam_idx)
