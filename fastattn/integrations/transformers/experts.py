"""A mixture's experts on fastattn: `fastattn.moe` where the gate is one of its own, else the module's gate between two grouped products."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.ops.grouped_mm import grouped_mm
from fastattn.ops.moe import ALPHA, LIMIT, moe
from fastattn.ops.moe_routing import moe_combine, moe_dispatch

from .activations import kind_of

try:
    from transformers.integrations import moe as hub
except ImportError:
    hub = None

ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "geglu"}  # fastattn.moe's name for a gate with this activation

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
    gate = known_gate(self)
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


def known_gate(experts: nn.Module) -> tuple[str, str] | None:
    """(activation, layout) of `fastattn.moe` if it computes what these experts do, else None. In doubt, None.

    What decides is the function that is the gate, and not its class alone: a subclass may have another.
    """
    if not experts.has_gate or _has_post_expert_norm(experts):
        return None
    activation = layout = None
    gate = getattr(experts._apply_gate, "__func__", None)
    if gate is not None and gate is getattr(hub, "_default_apply_gate", None):
        activation, layout = ACTIVATIONS.get(kind_of(experts.act_fn)), "concatenated"
    elif getattr(gate, "__module__", "").startswith("transformers.models."):
        layout, *names = CLAMPED_GATES.get(gate.__qualname__, (None,))
        if layout is not None and tuple(getattr(experts, name) for name in names) == (ALPHA, LIMIT):
            activation = "clamped_swiglu"
    if activation is None or experts.is_concatenated != (layout == "concatenated"):
        return None
    return activation, layout
