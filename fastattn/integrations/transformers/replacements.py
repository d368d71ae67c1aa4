"""What `patch` puts in place of which class's forward, as a table, and the forwards.

A row is found by a class's full name, and holds only where the module is what the row was written for: the class's own forward is
transformers', and the attributes that the new forward reads are there. In doubt a module is left, with the reason. What each row computes
is held to the class's own forward by tests/test_transformers_patch.py.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.ops.glu import geglu, swiglu
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.rotary import apply_rotary

from .activations import kind_of
from .experts import experts_forward


class Row(NamedTuple):
    """part: what a report calls it; by: fastattn's functions; forward: (module, *args) -> what the class's forward gives, a function of
    this module so that it can be pickled; unfit: why a module of the class must be left, or None."""

    part: str
    by: str
    forward: Callable[..., Any] | None
    unfit: Callable[[nn.Module], str | None]


# --------------------------------------------------------------------------------------------------------------------
# Norms.


def llama_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """weight · (x/√(mean x² + eps) rounded to x's dtype)"""
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, cast_before_weight=True)


def gpt_oss_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """weight · x/√(mean x² + eps), rounded to x's dtype (which rms_norm leaves under autocast, and this class does not)"""
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon).to(hidden_states.dtype)


def gemma_norm(self: nn.Module, x: Tensor) -> Tensor:
    """(1 + weight) · x/√(mean x² + eps), rounded to x's dtype"""
    return rms_norm(x, self.weight.shape, self.weight, self.eps, weight_offset=1.0).to(x.dtype)


def t5_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Llama's where x and weight have one dtype. T5's last linear layers stay in float32, and then a float32 x meets half-precision
    weights: normalised in float32 it is rounded to the weights' dtype, whatever x's was."""
    if hidden_states.dtype == self.weight.dtype:
        return llama_norm(self, hidden_states)
    y = rms_norm(hidden_states.float(), self.weight.shape, None, self.variance_epsilon)
    return self.weight * (y if self.weight.dtype == torch.float32 else y.to(self.weight.dtype))


def torch_layer_norm(self: nn.LayerNorm, input: Tensor) -> Tensor:
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _unfit_norm(eps: str) -> Callable[[nn.Module], str | None]:
    def unfit(module: nn.Module) -> str | None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            return "its weight is not a vector"
        if not isinstance(getattr(module, eps, None), (int, float)):
            return f"it has no number {eps}"
        return None

    return unfit


# --------------------------------------------------------------------------------------------------------------------
# Rotary embedding: a function of the modeling file, which the attention's forward finds among its globals.

ROTARY = "apply_rotary_pos_emb"


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' function: q (B, H, S, D) and k, or (B, S, H, D) with unsqueeze_dim=2; cos, sin (B or 1, S, D), every angle twice, or
    (B or 1, S, D/2) of each once."""
    half = q.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if unsqueeze_dim == 2:
        return apply_rotary(q, k, cos, sin)
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def with_rotary(attention: type[nn.Module]) -> types.FunctionType:
    """A copy of the class's forward in which apply_rotary_pos_emb is the one above, and every other global what it is now."""
    forward = attention.forward
    names = {**forward.__globals__, ROTARY: apply_rotary_pos_emb}
    del names["__name__"]  # torch.compile would look the globals up in the module of that name
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _unfit_attention(module: nn.Module) -> str | None:
    forward = type(module).forward
    if not inspect.isfunction(forward) or hasattr(forward, "__wrapped__") or ROTARY not in forward.__code__.co_names:
        return f"its forward does not call {ROTARY}"
    if getattr(forward.__globals__.get(ROTARY), "__module__", None) != type(module).__module__:
        return f"its {ROTARY} is not transformers' own"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Gated MLPs.

GATED = {
    "silu": swiglu,
    "gelu": lambda gate, up: geglu(gate, up, approximate="none"),
    "gelu_tanh": lambda gate, up: geglu(gate, up, approximate="tanh"),
}


def gated_mlp(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(GATED[kind_of(self.act_fn)](self.gate_proj(x), self.up_proj(x)))


def t5_gated_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    hidden_states = self.dropout(GATED[kind_of(self.act)](self.wi_0(hidden_states), self.wi_1(hidden_states)))
    weight = self.wo.weight
    if isinstance(weight, Tensor) and hidden_states.dtype != weight.dtype and weight.dtype != torch.int8:
        hidden_states = hidden_states.to(weight.dtype)  # which stays in float32 where the others are in half precision
    return self.wo(hidden_states)


def _unfit_mlp(activation: str, *layers: str) -> Callable[[nn.Module], str | None]:
    def unfit(module: nn.Module) -> str | None:
        if missing := [name for name in layers if not isinstance(getattr(module, name, None), nn.Module)]:
            return f"it has no {missing[0]}"
        act = getattr(module, activation, None)
        return None if kind_of(act) else f"its activation is {type(act).__name__}"

    return unfit


# --------------------------------------------------------------------------------------------------------------------
# Experts.


def _unfit_experts(module: nn.Module) -> str | None:
    if missing := [name for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated") if not hasattr(module, name)]:
        return f"it has no {missing[0]}: this transformers does not say how its weights lie"
    if module.num_experts > 512:
        return f"it has {module.num_experts} experts, more than 512"
    return None


# --------------------------------------------------------------------------------------------------------------------
# The table.


def _rows(row: Row, *names: str) -> dict[str, Row]:
    """The row under the full name of each class; "llama.LlamaMLP" is one of transformers' model llama."""
    models = (name.split(".") for name in names)
    return {f"transformers.models.{model}.modeling_{model}.{name}": row for model, name in models}


def _left(part: str, why: str) -> Row:
    return Row(part, "", None, lambda module: why)


_NO_GATE = _left("mlp", "it has no gate")

TABLE: dict[str, Row] = {
    **_rows(
        Row("norm", "rms_norm", llama_norm, _unfit_norm("variance_epsilon")),
        "llama.LlamaRMSNorm", "mistral.MistralRMSNorm", "mixtral.MixtralRMSNorm", "qwen2.Qwen2RMSNorm", "qwen3.Qwen3RMSNorm",
        "qwen3_moe.Qwen3MoeRMSNorm",
    ),
    **_rows(Row("norm", "rms_norm", gpt_oss_norm, _unfit_norm("variance_epsilon")), "gpt_oss.GptOssRMSNorm"),
    **_rows(Row("norm", "rms_norm", gemma_norm, _unfit_norm("eps")), "gemma2.Gemma2RMSNorm", "gemma3.Gemma3RMSNorm"),
    **_rows(Row("norm", "rms_norm", t5_norm, _unfit_norm("variance_epsilon")), "t5.T5LayerNorm"),
    "torch.nn.modules.normalization.LayerNorm": Row("norm", "layer_norm", torch_layer_norm, lambda module: None),
    **_rows(
        Row("rotary", "apply_rotary", with_rotary, _unfit_attention),
        "llama.LlamaAttention", "mistral.MistralAttention", "mixtral.MixtralAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention",
        "qwen3_moe.Qwen3MoeAttention", "gemma2.Gemma2Attention", "gemma3.Gemma3Attention", "gpt_oss.GptOssAttention",
    ),
    **_rows(
        Row("mlp", "swiglu, geglu", gated_mlp, _unfit_mlp("act_fn", "gate_proj", "up_proj", "down_proj")),
        "llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP", "qwen3.Qwen3MLP", "qwen3_moe.Qwen3MoeMLP", "gemma2.Gemma2MLP",
        "gemma3.Gemma3MLP",
    ),
    **_rows(
        Row("mlp", "swiglu, geglu", t5_gated_mlp, _unfit_mlp("act", "wi_0", "wi_1", "wo", "dropout")), "t5.T5DenseGatedActDense"
    ),
    **_rows(_NO_GATE, "t5.T5DenseActDense", "gpt2.GPT2MLP", "bert.BertIntermediate", "vit.ViTMLP"),
    **_rows(_left("mlp", "a router around experts, which have a row of their own"), "gpt_oss.GptOssMLP"),
    **_rows(
        Row("experts", "moe", experts_forward, _unfit_experts), "mixtral.MixtralExperts", "qwen3_moe.Qwen3MoeExperts",
        "gpt_oss.GptOssExperts",
    ),
}  # fmt: skip
