"""What a transformer is made of: one frozen dataclass, and the published architectures as a few lines of it each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.nn.rotary import NUMBERS as ROPE_TYPES

# The values of each choice, by field.
CHOICES = {
    "positions": ("rotary", "learned", "sinusoidal", "alibi"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "both"),
    "activation": ("swiglu", "geglu", "gelu"),
}
_POSITIVE = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_seqlen", "top_k",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of a transformer. The defaults are Llama's choices.

    Sizes:
        vocab_size V, hidden_size H, num_layers L. num_heads, and num_kv_heads (default num_heads), which divides it: fewer is grouped-query
        attention, 1 multi-query. head_dim D (default hidden_size / num_heads). intermediate_size I: the feed-forward layer's width
        (default 4·H for "gelu", else 8/3·H rounded up to a multiple of 32). max_seqlen: the longest sequence.
    Positions:
        positions: "rotary" turns queries and keys by their position; "learned" and "sinusoidal" add a vector to each token's embedding;
        "alibi" lowers attention scores by distance, and knows no longest sequence.
        rope_theta, rope_scaling: the base of the rotary angles, and what `fastattn.nn.RotaryEmbedding` takes as `scaling`.
    Blocks:
        norm: "rms" or "layer"; norm_eps. norm_offset: added to an RMS norm's weight (Gemma's is 1).
        norm_position: "pre" normalises what goes into a sublayer, x + f(norm(x)); "post" the sum, norm(x + f(x)), as the first transformer
        did; "both" also what comes out, x + norm(f(norm(x))), as Gemma-2 does.
        activation: of the feed-forward layer: "swiglu" and "geglu" have a gate, "gelu" (by tanh, as GPT-2) has none.
        bias: of every linear layer, and of layer norms.
        qk_norm: RMS-normalise queries and keys by head, before they are rotated.
    Attention:
        window: an int W: a token sees W tokens, itself the last; None: all before it. A tuple of these is repeated over the layers.
        softcap: bounds attention scores to ±softcap; final_softcap the logits; 0 leaves them. softmax_scale: default 1/√D.
    Embeddings:
        tied_embeddings: the matrix that embeds tokens also makes the logits. embedding_scale: multiplies the embeddings; None: √H.
    Experts:
        num_experts E: 0 for none; else each feed-forward layer is E of them, of which a token goes through top_k.
        load_balancing_coef, z_loss_coef: of the auxiliary losses, in training.
    Training:
        dropout: of embeddings, attention weights and each sublayer's output. init_std: of weights at first.

    Raises: ValueError, TypeError by the field's name.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_seqlen: int = 1024
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_position: str = "pre"
    activation: str = "swiglu"
    bias: bool = False
    qk_norm: bool = False
    window: int | tuple[int | None, ...] | None = None
    softcap: float = 0.0
    final_softcap: float = 0.0
    softmax_scale: float | None = None
    tied_embeddings: bool = True
    embedding_scale: float | None = 1.0
    num_experts: int = 0
    top_k: int = 2
    load_balancing_coef: float = 0.01
    z_loss_coef: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_choices()
        self._fill_in()
        for name in _POSITIVE:
            if (value := self._integer(name)) < 1:
                reject(name, "be positive", value)
        if self.num_heads % self.num_kv_heads:
            reject("num_kv_heads", f"divide num_heads = {self.num_heads}", self.num_kv_heads)
        if self.positions == "rotary" and self.head_dim % 2:
            reject("head_dim", "be even with rotary positions", self.head_dim)
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            reject("hidden_size", "be even with sinusoidal positions", self.hidden_size)
        if self._integer("num_experts") < 0 or 0 < self.num_experts < self.top_k:
            reject("num_experts", f"be 0 or at least top_k = {self.top_k}", self.num_experts)
        if self.num_experts and (self.activation == "gelu" or self.bias):
            what = "bias" if self.bias else "activation"
            reject(what, "be False with experts" if self.bias else "be gated with experts", repr(getattr(self, what)))
        for window in self.window if isinstance(self.window, tuple) else (self.window,):
            if window is not None and (not _is_int(window) or window < 1):
                reject("window", "be None, a positive int or a tuple of these", self.window)
        if self.window == ():
            reject("window", "be None, a positive int or a tuple of these", self.window)
        self._check_numbers()

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                reject(name, f"be one of {', '.join(map(repr, choices))}", repr(getattr(self, name)))
        for name in ("bias", "qk_norm", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                reject(name, "be True or False", repr(getattr(self, name)), TypeError)

    def _fill_in(self) -> None:
        """The defaults that follow from other fields, as values: what a saved config says does not depend on them."""
        for name in ("hidden_size", "num_heads"):
            if self._integer(name) < 1:
                reject(name, "be positive", getattr(self, name))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                reject("hidden_size", f"be a multiple of num_heads = {self.num_heads} where head_dim is None", self.hidden_size)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.intermediate_size is None:
            width = 4 * self.hidden_size if self.activation == "gelu" else -(-self.hidden_size // 12) * 32
            object.__setattr__(self, "intermediate_size", width)
        if self.embedding_scale is None:
            object.__setattr__(self, "embedding_scale", self.hidden_size**0.5)
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))

    def _check_numbers(self) -> None:
        for name, low in (("norm_eps", 0.0), ("softcap", 0.0), ("final_softcap", 0.0), ("init_std", 0.0), ("dropout", 0.0)):
            if not getattr(self, name) >= low:
                reject(name, f"be at least {low:g}", getattr(self, name))
        if self.dropout >= 1.0:
            reject("dropout", "lie in [0, 1)", self.dropout)
        if not self.rope_theta > 0.0:
            reject("rope_theta", "be positive", self.rope_theta)
        if self.norm_offset and self.norm == "layer":
            reject("norm_offset", "be 0 with layer norms", self.norm_offset)
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES or rope_type == "dynamic":
            known = ", ".join(name for name in ROPE_TYPES if name != "dynamic")
            reject("rope_scaling", f"have a rope_type of {known}", repr(rope_type))

    def _integer(self, name: str) -> int:
        value = getattr(self, name)
        if not _is_int(value):
            reject(name, "be an int", repr(value), TypeError)
        return value

    def layer_window(self, layer_idx: int) -> int | None:
        """How many tokens a token of that layer sees, itself the last; None for all."""
        return self.window[layer_idx % len(self.window)] if isinstance(self.window, tuple) else self.window

    def to_dict(self) -> dict[str, Any]:
        """Every field, of types that JSON has."""
        return dataclasses.asdict(self) | ({"window": list(self.window)} if isinstance(self.window, tuple) else {})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`. Fields that it lacks have their defaults; one that no config has is refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"Config: there is no field {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"Config: {', '.join(missing)} must be given")
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The config of that name in `PRESETS`, with some fields changed.

        Example:
            >>> Config.preset("llama-tiny", vocab_size=4096, max_seqlen=512)
        """
        if name not in PRESETS:
            raise ValueError(f"Config.preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict(PRESETS[name] | changes)


def reject(name: str, must: str, got: object, error: type[Exception] = ValueError) -> None:
    raise error(f"Config: {name} must {must}, got {got}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# The choices that make an architecture, apart from its sizes.
_GPT2 = dict(positions="learned", norm="layer", activation="gelu", bias=True)  # Radford et al., 2019
_LLAMA = dict(positions="rotary", norm="rms", activation="swiglu")  # Touvron et al., arXiv 2302.13971
_GEMMA = dict(  # Gemma 2, arXiv 2408.00118
    positions="rotary", norm="rms", norm_eps=1e-6, norm_offset=1.0, norm_position="both", activation="geglu", softcap=50.0,
    final_softcap=30.0, embedding_scale=None,
)  # fmt: skip
_TINY = dict(vocab_size=259, hidden_size=128, num_layers=4, num_heads=4, max_seqlen=256)  # of `ByteTokenizer`

PRESETS: dict[str, dict[str, Any]] = {
    # GPT-2 small, 124 M
    "gpt2": _GPT2 | dict(vocab_size=50257, hidden_size=768, num_layers=12, num_heads=12, max_seqlen=1024),
    # Llama-3 8B
    "llama": _LLAMA | dict(
        vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, max_seqlen=8192,
        rope_theta=500000.0, tied_embeddings=False,
    ),
    # Mistral 7B v0.1
    "mistral": _LLAMA | dict(
        vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, max_seqlen=32768,
        window=4096, tied_embeddings=False,
    ),
    # Gemma-2 2B
    "gemma": _GEMMA | dict(
        vocab_size=256000, hidden_size=2304, num_layers=26, num_heads=8, num_kv_heads=4, head_dim=256, intermediate_size=9216,
        max_seqlen=8192, window=(4096, None),
    ),
    # Mixtral 8x7B
    "moe": _LLAMA | dict(
        vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, max_seqlen=32768,
        rope_theta=1000000.0, tied_embeddings=False, num_experts=8, top_k=2,
    ),
    # About a million parameters each: minutes on two CPU cores.
    "gpt2-tiny": _GPT2 | _TINY,
    "llama-tiny": _LLAMA | _TINY | dict(num_kv_heads=2),
    "mistral-tiny": _LLAMA | _TINY | dict(num_kv_heads=2, window=64),
    "gemma-tiny": _GEMMA | _TINY | dict(num_kv_heads=2, window=(64, None)),
    "moe-tiny": _LLAMA | _TINY | dict(num_kv_heads=2, intermediate_size=128, num_experts=8, top_k=2),
}  # fmt: skip
