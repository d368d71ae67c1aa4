"""Hugging Face transformers (5.17 and newer) on fastattn.

    from fastattn.integrations import transformers as on_transformers
    on_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn", experts_implementation="fastattn")

`model.set_attn_implementation("fastattn")` and `model.set_experts_implementation("fastattn")` switch a model that is already loaded. No
model code is patched: transformers has a registry of attention functions and one of mask functions, and a name must be in both (without
the second, a model is given no mask at all, even for a padded batch), and a registry of what runs a mixture's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2CLS
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from fastattn.ops.attention import attention
from fastattn.ops.grouped_mm import grouped_mm
from fastattn.ops.moe import ALPHA, LIMIT, moe
from fastattn.ops.moe_routing import moe_combine, moe_dispatch

try:
    from transformers.integrations import moe as hub
except ImportError:
    hub = None

NAME = "fastattn"


def register() -> None:
    """Make "fastattn" a value of `attn_implementation` and of `experts_implementation`. Calling it again changes nothing.

    A transformers without a registry of experts is left without the second: its models run their experts as they did.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    experts = getattr(hub, "ALL_EXPERTS_FUNCTIONS", None)
    if experts is not None:
        experts.register(NAME, experts_forward)


# --------------------------------------------------------------------------------------------------------------------
# Attention.


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer, as transformers calls it.

    query: (B, H, S_q, D); key, value: (B, H_kv, S_k, ·), not repeated. attention_mask: None, or broadcastable to (B, H, S_q, S_k), bool
    (True = attend) or added to the scores; it then says everything about visibility. Without one, `is_causal` (the module's own by
    default, aligned to the last key) and `sliding_window` W do: a query sees W keys, itself included. s_aux: (H,) sink logits.
    position_bias: (1 or B, H, S_q, S_k), added to the scores, with its gradient. cu_seq_lens_*: B is 1 and the row holds these sequences
    one after the other; the mask, which then repeats what they say, is not read.

    Returns (B, S_q, H, D_v), and None in place of the weights, which are never formed.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    causal, window, bias = False, (None, None), None
    if packed or attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if sliding_window is not None:
            window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    else:
        bias = attention_mask
    if position_bias is not None:
        bias = _add_position_bias(position_bias, bias)
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "attn_bias": bias,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    if not packed:
        return attention(q, k, v, **options).contiguous(), None

    lengths = {"cu_seqlens_q": cu_seq_lens_q.int(), "cu_seqlens_k": cu_seq_lens_k.int()}
    # a length that is a tensor would cost a synchronisation to read; the token count bounds it as well
    for name, length in (("max_seqlen_q", max_length_q), ("max_seqlen_k", max_length_k)):
        lengths[name] = length if isinstance(length, int) else None
    out = attention(*(t.flatten(0, 1) for t in (q, k, v)), **lengths, **options)
    return out.unflatten(0, q.shape[:2]), None


def _add_position_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """T5's learned bias and a mask as one float bias; the causal flag, where there is no mask, stays a flag."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask a model builds once per forward and mask kind: None where flags can say it, so that no S × S matrix is made.

    None means: causal, aligned to the last key, and the layer's own sliding window (or all keys, for a bidirectional model). Anything
    else (padding, packed positions, chunks, a static cache's unused tail) is a dense bool (B, 1, S_q, S_k), True = attend.
    """
    flags_suffice = (
        allow_is_causal_skip
        and not allow_is_bidirectional_skip
        and isinstance(q_offset, int)
        and kv_length == q_length + q_offset - kv_offset
        and (
            local_size is None
            or (kv_offset == 0 and kv_length <= local_size)  # once a cache has slid, even few keys may be of two chunks
            or _is_sliding_window(mask_function, local_size)
        )
        and _nothing_padded(attention_mask, kv_length)
    )
    if flags_suffice:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


def _nothing_padded(attention_mask: Tensor | None, kv_length: int) -> bool:
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling():  # reading the mask's values would break the graph
        return False
    return bool(attention_mask[:, -kv_length:].all())


def _is_sliding_window(mask_function: Callable, size: int) -> bool:
    """Both a sliding window and fixed chunks of `size` keys arrive as `local_size`; a layer's flags can say only the first.

    In a window each query sees the key `size - 1` before it. In chunks only a chunk's last query does, so that of two
    neighbours one does not, wherever chunks begin.
    """
    if torch.compiler.is_compiling():
        return False
    numbers = torch.tensor([0, 1, size - 1, size])  # its elements have no dims, and so mix with any device's
    zero, one, last, first = numbers
    return size > 1 and all(bool(mask_function(zero, zero, *pair)) for pair in ((last, zero), (first, one)))


# --------------------------------------------------------------------------------------------------------------------
# Experts.


def _classes(*names: str) -> set[type]:
    """Those of transformers' activations of these names; an entry is a class, or a class with its arguments."""
    found = (ACT2CLS.get(name) for name in names)
    return {entry[0] if isinstance(entry, tuple) else entry for entry in found if entry is not None}


SILU = _classes("silu", "swish") | {nn.SiLU}
GELU_TANH = _classes("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate")  # one formula

# gpt-oss's gate and its copies: the function, the layout that it reads, and the attributes that hold alpha and limit.
CLAMPED_GATES = {
    "GptOssExperts._apply_gate": ("interleaved", "alpha", "limit"),
    "OpenAIPrivacyFilterExperts._apply_gate": ("concatenated", "alpha", "limit"),
    "MiniMaxM3VLExperts._apply_gate": ("concatenated", "swiglu_alpha", "swiglu_limit"),
}


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts of one layer, as transformers calls it.

    hidden_states: (T, H). top_k_index, top_k_weights: (T, K); ids of `self.num_experts` or more, which expert parallelism gives to the
    experts of other ranks, add nothing. Returns (T, H).

    Where the gate is one of `fastattn.moe`'s, that is what runs. Any other (an exact gelu, another clamp, no gate, a norm after the
    experts) is computed by the module's own `_apply_gate` or `act_fn`, between two grouped products. Router weights are read as fp32.

    Raises: TypeError for float64 experts, ValueError for more than 512 of them, which eager would run.
    """
    top_k_weights = top_k_weights.float()
    x = hidden_states.to(self.down_proj.dtype)
    gate_up_name = "gate_up_proj" if self.has_gate else "up_proj"
    gate_up_proj, down_proj = getattr(self, gate_up_name), self.down_proj
    gate_up_bias, down_bias = (getattr(self, f"{name}_bias") if self.has_bias else None for name in (gate_up_name, "down_proj"))
    gate = _known_gate(self)
    if gate is not None:
        activation, layout = gate
        out = moe(
            x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
            layout=layout, transposed=self.is_transposed,
        )  # fmt: skip
        return out.to(hidden_states.dtype)

    if self.is_transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    plan = moe_dispatch(top_k_index, self.num_experts)
    y = grouped_mm(x, gate_up_proj, plan.offsets, bias=gate_up_bias, gather=plan.order // top_k_index.shape[1])
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = grouped_mm(y.to(x.dtype), down_proj, plan.offsets, bias=down_bias)
    if _has_post_expert_norm(self):
        y = self.post_expert_norm(y)
    return moe_combine(y, plan, top_k_weights).to(hidden_states.dtype)


def _has_post_expert_norm(experts: nn.Module) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # transformers 5.17 knows of none


def _known_gate(experts: nn.Module) -> tuple[str, str] | None:
    """(activation, layout) of `fastattn.moe` if it computes what these experts do, else None. In doubt, None.

    What decides is the function that is the gate, and not its class alone: a subclass may have another.
    """
    if not experts.has_gate or _has_post_expert_norm(experts):
        return None
    activation = layout = None
    gate = getattr(experts._apply_gate, "__func__", None)
    if gate is not None and gate is getattr(hub, "_default_apply_gate", None):
        act, layout = experts.act_fn, "concatenated"
        if act is nn.functional.silu or type(act) in SILU:
            activation = "swiglu"
        elif type(act) in GELU_TANH or (type(act) is nn.GELU and act.approximate == "tanh"):
            activation = "geglu"
    elif getattr(gate, "__module__", "").startswith("transformers.models."):
        layout, *names = CLAMPED_GATES.get(gate.__qualname__, (None,))
        if layout is not None and tuple(getattr(experts, name) for name in names) == (ALPHA, LIMIT):
            activation = "clamped_swiglu"
    if activation is None or experts.is_concatenated != (layout == "concatenated"):
        return None
    return activation, layout
