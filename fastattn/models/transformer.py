"""A transformer, whole: a language model that reads tokens and says, at each, what the next one may be.

    tokens (…)  →  embedding (…, H)  →  L blocks  →  norm  →  logits (…, V)

A block adds two things to what comes in, the residual stream (…, H): what attention reads from the tokens before, and what a feed-forward
layer, or a few of many experts, makes of each token alone. Everything that takes time is one of fastattn's kernels.

Letters: B sequences of S tokens, or T tokens packed without padding; H hidden size, V vocabulary, I the feed-forward layer's width.
"…" is (B, S) or (T,).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn.nn as fnn
from fastattn.kv_cache import PagedKVCache
from fastattn.ops.attention import visible_pairs
from fastattn.ops.glu import geglu, swiglu
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

from .config import Config
from .positions import alibi_slopes, positions_of, sinusoidal

GATED = {"swiglu": swiglu, "geglu": geglu}


class MLP(nn.Module):
    """The feed-forward layer, on each token alone: up to I numbers, bent, and down again. With a gate, one half is scaled by the other."""

    def __init__(self, config: Config, **made: Any) -> None:
        super().__init__()
        hidden_size, width = config.hidden_size, config.intermediate_size
        self.gated = GATED.get(config.activation)
        self.gate_proj = nn.Linear(hidden_size, width, config.bias, **made) if self.gated else None
        self.up_proj = nn.Linear(hidden_size, width, config.bias, **made)
        self.down_proj = nn.Linear(width, hidden_size, config.bias, **made)

    def forward(self, x: Tensor) -> Tensor:  # (…, H)
        up = self.up_proj(x)  # (…, I)
        inner = self.gated(self.gate_proj(x), up) if self.gated else F.gelu(up, approximate="tanh")
        return self.down_proj(inner)  # (…, H)


class Block(nn.Module):
    """One layer. With norm_position "pre", as nearly all models have it,

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    and "post" is x = norm(x + f(x)), "both" is x = x + norm(f(norm(x))). A decoder that has a context attends to it in between.
    """

    def __init__(self, config: Config, layer_idx: int, *, causal: bool = True, cross_attention: bool = False, **made: Any) -> None:
        super().__init__()
        self.layer_idx, self.causal, self.dropout, self.norm_position = layer_idx, causal, config.dropout, config.norm_position
        window = config.layer_window(layer_idx)
        self.attention = make_attention(config, window if causal or window is None else (window - 1, window - 1), **made)
        self.cross_attention = make_attention(config, None, **made) if cross_attention else None
        self.moe, self.mlp = (make_moe(config, **made), None) if config.num_experts else (None, MLP(config, **made))

        # What goes into each sublayer ("post": the sum after it) is normalised, and with "both" what comes out of it, too.
        self.attention_norm, self.mlp_norm = make_norm(config, **made), make_norm(config, **made)
        self.cross_norm = make_norm(config, **made) if cross_attention else None
        out = [make_norm(config, **made) if config.norm_position == "both" else nn.Identity() for _ in range(3)]
        self.attention_out_norm, self.mlp_out_norm, self.cross_out_norm = *out[:2], out[2] if cross_attention else None

    def forward(
        self, x: Tensor, *, context: dict[str, Any] | None = None, auxes: list[fnn.MoEAux] | None = None, **places: Any
    ) -> Tensor:
        """The residual stream (…, H) after this layer, of that before it.

        places: where the tokens stand, as `fastattn.nn.Attention` takes it: cos, sin, alibi_slopes, cu_seqlens, max_seqlen, cache.
        context: in a block with cross-attention, that module's arguments: context, cu_seqlens, cu_seqlens_context and so on.
        auxes: a list to which a mixture of experts appends what its router did.
        """
        if self.norm_position == "post":
            x = self.attention_norm(x + self._attend(x, places))
            if self.cross_attention is not None:
                x = self.cross_norm(x + self._cross_attend(x, context))
            return self.mlp_norm(x + self._feed_forward(x, auxes))

        out = self._attend(self.attention_norm(x), places)
        if self.cross_attention is not None:
            h, x = self.cross_norm(out, x)
            out = self._cross_attend(h, context)
        h, x = self.mlp_norm(out, x)  # x = x + out, h = norm(x), in one kernel
        return x + self._feed_forward(h, auxes)

    def _attend(self, x: Tensor, places: dict[str, Any]) -> Tensor:
        out = self.attention(x, causal=self.causal, layer_idx=self.layer_idx, **places)
        return F.dropout(self.attention_out_norm(out), self.dropout, self.training)

    def _cross_attend(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return F.dropout(self.cross_out_norm(self.cross_attention(x, **context)), self.dropout, self.training)

    def _feed_forward(self, x: Tensor, auxes: list[fnn.MoEAux] | None) -> Tensor:
        if self.moe is None:
            out = self.mlp(x)
        else:
            out, aux = self.moe(x)
            if auxes is not None:
                auxes.append(aux)
        return F.dropout(self.mlp_out_norm(out), self.dropout, self.training)


def make_attention(config: Config, window: int | tuple[int, int] | None, **made: Any) -> fnn.Attention:
    return fnn.Attention(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.bias, qk_norm=config.qk_norm,
        qk_norm_eps=config.norm_eps, window=window, softmax_scale=config.softmax_scale, softcap=config.softcap, dropout_p=config.dropout,
        **made,
    )  # fmt: skip


def make_moe(config: Config, **made: Any) -> fnn.MoE:
    sizes = config.hidden_size, config.intermediate_size, config.num_experts, config.top_k
    return fnn.MoE.mixtral(*sizes, activation=config.activation, **made)


def make_norm(config: Config, **made: Any) -> nn.Module:
    if config.norm == "layer":
        return fnn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias, **made)
    return fnn.RMSNorm(config.hidden_size, config.norm_eps, weight_offset=config.norm_offset, **made)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: a `Config`. device, dtype: of the parameters; torch's defaults.

    Attributes:
        embedding: nn.Embedding (V, H). position_embedding: the same of positions, where they are learned. layers: the L `Block`s, each
        of whose outputs is the residual stream. norm: the last one. unembedding: nn.Linear (H → V), None where tied. checkpointing: set to
        True to keep only each layer's input for the backward, and compute the rest again there.

    Sequences are (B, S), or packed (T,) with cu_seqlens; both give the same numbers, and so does a `cache`. The state_dict holds parameters
    alone.

    Example:
        >>> model = Transformer(Config.preset("llama-tiny"))
        >>> tokens = torch.randint(256, (2, 65))
        >>> model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    """

    causal = True

    def __init__(self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        made = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, **made)
        self.position_embedding = nn.Embedding(config.max_seqlen, config.hidden_size, **made) if config.positions == "learned" else None
        self.rotary = make_rotary(config, device)
        self.layers = nn.ModuleList(self._make_block(layer_idx, **made) for layer_idx in range(config.num_layers))
        # After "post" blocks the stream is normalised already.
        self.norm = nn.Identity() if config.norm_position == "post" else make_norm(config, **made)
        self.unembedding = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False, **made)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    def _make_block(self, layer_idx: int, **made: Any) -> Block:
        return Block(self.config, layer_idx, causal=self.causal, **made)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all parameters anew, by torch's generator: normal with config.init_std, and where a layer adds to the residual stream,
        smaller by √(2·L), so that the stream does not grow with depth (Radford et al., 2019); biases 0, norms 1."""
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, fnn.RMSNorm | fnn.LayerNorm):
                module.reset_parameters()
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                adds = "o_proj" in name or "down_proj" in name
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.num_layers) if adds else std)

    # Forward

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits (…, V) of the token after each. Options: those of `hidden`."""
        return self.head(self.hidden(tokens, **options))

    def hidden(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cache: PagedKVCache | None = None
    ) -> Tensor:
        """Hidden states (…, H) after the last norm.

        Args:
            tokens: (B, S), or (T,) with cu_seqlens or a cache; int64 or int32.
            cu_seqlens: (N + 1,) int32: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]; none sees another.
            max_seqlen: the longest of them, if known: T is the bound otherwise.
            cache: of `new_cache`, whose `step` has been taken; tokens are that step's. There is no gradient.

        Raises: ValueError, TypeError for tokens of another shape or type, for ids that are not in the vocabulary (on the CPU), and for
            sequences longer than config.max_seqlen, where a length is known without reading cu_seqlens.
        """
        return self._hidden(tokens, cu_seqlens, max_seqlen, cache)[0]

    def _hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: PagedKVCache | None,
        contexts: list[dict[str, Any]] | None = None,
    ) -> tuple[Tensor, list[fnn.MoEAux]]:  # fmt: skip
        """`hidden`, and what the routers did. contexts: for each layer that has cross-attention, what to attend to."""
        self._check(tokens, cu_seqlens, max_seqlen, cache)
        x = self.embed(tokens, positions_of(tokens, cu_seqlens, cache))  # (…, H)
        places = self._places(x.device) | {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "cache": cache}
        auxes: list[fnn.MoEAux] = []
        for layer in self.layers:
            of_layer = places if contexts is None else places | {"context": contexts[layer.layer_idx]}
            if self.checkpointing and torch.is_grad_enabled():
                x, layer_auxes = checkpoint(_run, layer, x, of_layer, use_reentrant=False)
            else:
                x, layer_auxes = _run(layer, x, of_layer)
            auxes += layer_auxes
        return self.norm(x), auxes

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream (…, H) before the first layer. positions: tokens' shape, or one that broadcasts to it."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded as Gemma rounds it
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal(positions, self.config.hidden_size).to(x.dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, H)."""
        logits, cap = F.linear(hidden, self.head_weight), self.config.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def head_weight(self) -> Tensor:
        """(V, H), what hidden states are multiplied by for logits."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of what comes after each token, without the logits in memory (a final softcap is applied on the way).

        Args:
            tokens, cu_seqlens, max_seqlen: as `hidden` takes them.
            labels: tokens' shape; labels[i] is the token that follows tokens[i], −100 where there is nothing to learn.
            reduction: "mean" over the labels that count, "sum", or "none", which is tokens' shape.

        In training a mixture of experts adds the mean over its layers of load_balancing_coef·load_balancing_loss + z_loss_coef·z_loss
        (times the number of labels that count for "sum", nothing for "none"); in evaluation it does not.

        Returns: a 0-d tensor of the hidden states' dtype, float32 under autocast.
        """
        hidden, auxes = self._hidden(tokens, cu_seqlens, max_seqlen, None)
        return self._loss(hidden, labels, auxes, reduction)

    def _loss(self, hidden: Tensor, labels: Tensor, auxes: list[fnn.MoEAux], reduction: str) -> Tensor:
        config = self.config
        loss = linear_cross_entropy(hidden, self.head_weight, labels, softcap=config.final_softcap, reduction=reduction)
        if not (auxes and self.training) or reduction == "none":
            return loss
        terms = [config.load_balancing_coef * aux.load_balancing_loss + config.z_loss_coef * aux.z_loss for aux in auxes]
        count = (labels != -100).sum() if reduction == "sum" else 1
        return loss + (torch.stack(terms).mean() * count).to(loss.dtype)

    # What generation and training need to know

    def new_cache(self, num_pages: int, page_size: int = 16, dtype: torch.dtype | None = None) -> PagedKVCache:
        """A cache of this model's layers and heads, on its device; dtype: by default the parameters'."""
        config, weight = self.config, self.embedding.weight
        return PagedKVCache(
            config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, dtype=dtype or weight.dtype, device=weight.device
        )

    def num_parameters(self) -> int:
        """All of them, a tied embedding once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seqlen: int) -> float:
        """Floating-point operations that training takes for one token of sequences of that length, forward and backward:

            6·N + 12·Σ_layers num_heads·D·(mean number of tokens that a token sees)

        N counts what multiplies a token: every matrix of the blocks (of the experts, the top_k that it goes through) and the head, but no
        lookup of an embedding. Model FLOPs utilisation is this times tokens per second, over the device's peak.
        """
        config = self.config
        looked_up = 0 if self.position_embedding is None else self.position_embedding.weight.numel()
        looked_up += 0 if self.unembedding is None else self.embedding.weight.numel()
        experts = sum(p.numel() for layer in self.layers if layer.moe is not None for p in layer.moe.experts.parameters())
        idle = experts * (1 - config.top_k / config.num_experts) if config.num_experts else 0
        lefts = [None if (w := config.layer_window(layer_idx)) is None else w - 1 for layer_idx in range(config.num_layers)]
        seen = sum(visible_pairs(seqlen, seqlen, left, 0 if self.causal else left) for left in lefts) / seqlen
        return 6 * (self.num_parameters() - looked_up - idle) + 12 * config.num_heads * config.head_dim * seen

    # Inside

    def _places(self, device: torch.device) -> dict[str, Tensor | None]:
        """How attention knows positions, the same in every layer."""
        if self.rotary is not None:
            return {"cos": self.rotary.cos, "sin": self.rotary.sin}
        return {"alibi_slopes": alibi_slopes(self.config.num_heads, device) if self.config.positions == "alibi" else None}

    def _check(self, tokens: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: PagedKVCache | None) -> None:
        name, limit = type(self).__name__, self.config.max_seqlen
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: tokens must be an int64 or int32 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
        if tokens.dim() != (1 if cu_seqlens is not None else 2) and not (cache is not None and tokens.dim() == 1):
            raise ValueError(f"{name}: tokens must have shape (T,) with cu_seqlens, (B, S) without, got {tuple(tokens.shape)}")
        if cache is not None and cache.current is None:
            raise ValueError(f"{name}: cache must have a current step, whose tokens these are: call step first")
        if cache is not None and tokens.numel() != len(cache.current.slots):
            raise ValueError(f"{name}: tokens must be the {len(cache.current.slots)} of the cache's current step, got {tokens.numel()}")
        if tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():
            low, high = map(int, tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"{name}: tokens must lie in [0, {self.config.vocab_size}), got {low if low < 0 else high}")
        if self.config.positions == "alibi":
            return
        seqlen = tokens.shape[1] if tokens.dim() == 2 and cache is None else max_seqlen
        if cache is not None and not torch.compiler.is_compiling():
            seqlen = max(memoryview(cache.pool.seqlens_k)[: len(cache.current.seqlens_k)], default=0)
        if seqlen is not None and seqlen > limit:
            raise ValueError(f"{name}: tokens must be of sequences no longer than max_seqlen = {limit}, got {seqlen}")


def _run(layer: Block, x: Tensor, places: dict[str, Any]) -> tuple[Tensor, list[fnn.MoEAux]]:
    """The stream after a layer, and what its router did."""
    auxes: list[fnn.MoEAux] = []
    return layer(x, auxes=auxes, **places), auxes


def make_rotary(config: Config, device: torch.device | str | None) -> fnn.RotaryEmbedding | None:
    if config.positions != "rotary":
        return None
    options = dict(base=config.rope_theta, max_seqlen=config.max_seqlen, scaling=config.rope_scaling)
    return fnn.RotaryEmbedding(config.head_dim, **options, device=device)
