"""A mixture of experts as a module: router, experts, and around them a shared expert, capacities and what balances the load."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.glu import swiglu
from fastattn.ops.moe import ACTIVATIONS, ALPHA, LAYOUTS, LIMIT, moe
from fastattn.ops.moe_routing import (
    MoEPlan,
    load_balancing_loss_of,
    moe_expert_counts,
    moe_route,
    moe_update_bias,
    moe_z_loss,
)

_OP = "MoE"


def _init_uniform(fan: int, *tensors: Tensor | None) -> None:
    """As torch's linear layers of that input size: within ±1/√fan, biases too."""
    for t in tensors:
        if t is not None:
            torch.nn.init.uniform_(t, -(fan**-0.5), fan**-0.5)


class MoEAux(NamedTuple):
    """What a training loop does with a forward's routing. Both losses are 0-d fp32, with gradients to the router and no coefficient.

    load_balancing_loss: Switch's E·Σ f_e·p_e, K where tokens are spread evenly. z_loss: the mean squared log-sum-exp of the logits.
    expert_counts: (E,) int64, the slots that chose each expert, before any is dropped.
    """

    load_balancing_loss: Tensor
    z_loss: Tensor
    expert_counts: Tensor


class Router(torch.nn.Module):
    """The logits of E experts: x·weightᵀ + bias, in float32 if `fp32`. e_score_correction_bias, where there is one, moves the choice."""

    def __init__(self, hidden_size: int, num_experts: int, bias: bool, selection_bias: bool, fp32: bool, **made: Any) -> None:
        super().__init__()
        self.fp32 = fp32
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden_size, **made))
        self.bias = torch.nn.Parameter(torch.empty(num_experts, **made)) if bias else None
        correction = torch.zeros(num_experts, dtype=torch.float32, device=made["device"]) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _init_uniform(self.weight.shape[1], self.weight, self.bias)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As torch's, but e_score_correction_bias stays float32 under `.half()` and `.to(torch.bfloat16)`, where a step of 0.001 on a
        bias of 0.5 would be lost to rounding."""
        correction = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if correction is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = correction.to(self.e_score_correction_bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch's, but with assign=True too e_score_correction_bias stays float32."""
        name = f"{prefix}e_score_correction_bias"
        if isinstance(state_dict.get(name), Tensor):
            state_dict = state_dict | {name: state_dict[name].float()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        checks.check_device(_OP, "x", x, "the router's", self.weight.device)
        if not self.fp32:
            if x.dtype != self.weight.dtype and not (x.is_meta or torch.is_autocast_enabled(x.device.type)):
                checks.reject(_OP, "x", f"have the router's dtype {self.weight.dtype}", x.dtype, TypeError)
            return F.linear(x, self.weight, self.bias)
        # Autocast would round float32 operands again; the meta device has none.
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"{hidden_size}, {num_experts}, bias={self.bias is not None}, fp32={self.fp32}"


class Experts(torch.nn.Module):
    """`fastattn.moe` over matrices of its own, named and laid out as transformers has them."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, activation: str, bias: bool, layout: str, transposed: bool,
        **made: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.check_choice(_OP, "activation", activation, ACTIVATIONS)
        checks.check_choice(_OP, "layout", layout, LAYOUTS)
        self.options = {"activation": activation, "layout": layout, "transposed": transposed}
        shapes = {"gate_up_proj": (2 * intermediate_size, hidden_size), "down_proj": (hidden_size, intermediate_size)}
        for name, (rows, cols) in shapes.items():
            size = (cols, rows) if transposed else (rows, cols)
            self.register_parameter(name, torch.nn.Parameter(torch.empty(num_experts, *size, **made)))
            of_rows = torch.nn.Parameter(torch.empty(num_experts, rows, **made)) if bias else None
            self.register_parameter(f"{name}_bias", of_rows)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        inputs = 1 if self.options["transposed"] else 2
        _init_uniform(self.gate_up_proj.shape[inputs], self.gate_up_proj, self.gate_up_proj_bias)
        _init_uniform(self.down_proj.shape[inputs], self.down_proj, self.down_proj_bias)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, plan: MoEPlan | None = None) -> Tensor:
        biases = {"gate_up_bias": self.gate_up_proj_bias, "down_bias": self.down_proj_bias}
        return moe(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, **biases, **self.options, plan=plan)

    def extra_repr(self) -> str:
        num_experts, *size = self.down_proj.shape
        hidden_size, intermediate_size = reversed(size) if self.options["transposed"] else size
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{num_experts}, {hidden_size}, {intermediate_size}, bias={self.down_proj_bias is not None}, {options}"


class SharedExpert(torch.nn.Module):
    """A SwiGLU MLP that every token goes through."""

    def __init__(self, hidden_size: int, intermediate_size: int, **made: Any) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False, **made)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False, **made)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias=False, **made)

    def reset_parameters(self) -> None:
        for proj in (self.gate_proj, self.up_proj, self.down_proj):
            proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class MoE(torch.nn.Module):
    """Router, experts and their weighted sum, as the layers of Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3 have them.

    `MoE.mixtral(…)`, `MoE.qwen3_moe(…)`, `MoE.gpt_oss(…)` and `MoE.deepseek_v3(…)` are these options by name, which load the state_dict of
    such a block in transformers, and whose own is one (but gpt-oss's, which calls `router` what is `gate` here);
    `MoE.from_transformers(block)` takes sizes and weights from one.

    Args:
        hidden_size, intermediate_size: H and I. num_experts: E, up to 512. top_k: K.
        activation: of the experts: "swiglu", "geglu" or "clamped_swiglu", as in `fastattn.moe`.
        score, order, renormalize, scaling_factor, num_groups, top_k_groups: how tokens are routed, as in `fastattn.moe_route`.
        router_bias: give the router's linear layer a bias.
        router_fp32: compute the logits in float32, under autocast too; else they have x's dtype.
        selection_bias: a buffer gate.e_score_correction_bias (E,) that moves the choice, 0 at first and always float32: `update_bias`
            balances the load by it, without a loss (arXiv 2408.15664).
        expert_bias: give both projections of the experts a bias.
        layout, transposed: how the experts' matrices lie, as in `fastattn.moe`.
        shared_intermediate_size: that of an expert which every token goes through, whose output is added; None for none.
        capacity_factor: c lets an expert take ⌈c·T·K/E⌉ of a forward's T·K slots, first come first served (in the order of tokens, then
            of k); the others are dropped: they add nothing. It is read as the fraction that it is written as, of a
            denominator up to a million: 1.1 of 10 slots are 11. None, as everywhere today, drops none.
        dtype: float16, bfloat16 or float32; torch's default.

    forward(x) → (out, aux): x (…, H), float16, bfloat16 or float32, out like x (under autocast, in its dtype), and `MoEAux`, which every
    forward computes: a few passes over the (T, E) logits. Nothing waits for the GPU.

    Raises: ValueError, TypeError for arguments that do not fit.

    Example:
        >>> layer = fastattn.nn.MoE.mixtral(64, 96, num_experts=8, top_k=2)
        >>> out, aux = layer(torch.randn(2, 10, 64))
        >>> loss = out.square().mean() + 0.01 * aux.load_balancing_loss
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        score: str = "softmax",
        order: str = "score_then_topk",
        renormalize: bool = False,
        scaling_factor: float = 1.0,
        num_groups: int | None = None,
        top_k_groups: int | None = None,
        router_bias: bool = False,
        router_fp32: bool = False,
        selection_bias: bool = False,
        expert_bias: bool = False,
        layout: str = "concatenated",
        transposed: bool = False,
        shared_intermediate_size: int | None = None,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts, "top_k": top_k}
        if shared_intermediate_size is not None:
            sizes["shared_intermediate_size"] = shared_intermediate_size
        for arg, value in sizes.items():
            if checks.integer(_OP, arg, value, "be an int") < 1:
                checks.reject(_OP, arg, "be positive", value)
        if top_k > num_experts:
            checks.reject(_OP, "top_k", f"be at most num_experts = {num_experts}", top_k)
        parameters_dtype = torch.get_default_dtype() if dtype is None else dtype
        if parameters_dtype not in checks.FLOAT_DTYPES:
            checks.reject(_OP, "dtype", "be float16, bfloat16 or float32", parameters_dtype, TypeError)
        self.hidden_size, self.num_experts, self.top_k, self.capacity_factor = hidden_size, num_experts, top_k, capacity_factor
        self.routing = {
            "score": score, "order": order, "renormalize": renormalize, "scaling_factor": scaling_factor, "num_groups": num_groups,
            "top_k_groups": top_k_groups,
        }  # fmt: skip
        moe_route(torch.empty(0, num_experts, device="meta"), top_k, **self.routing)  # refuses now what it would refuse in a forward
        made = {"device": device, "dtype": dtype}
        self.gate = Router(hidden_size, num_experts, router_bias, selection_bias, router_fp32, **made)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, activation, expert_bias, layout, transposed, **made)
        shared = shared_intermediate_size
        self.shared_experts = None if shared is None else SharedExpert(hidden_size, shared, **made)
        self.register_load_state_dict_pre_hook(_adapt)

    @classmethod
    def mixtral(cls, hidden_size: int, intermediate_size: int, num_experts: int = 8, top_k: int = 2, **options: Any) -> MoE:
        """Mixtral's block: a softmax over all experts, renormalised over the chosen."""
        return cls(hidden_size, intermediate_size, num_experts, top_k, renormalize=True, **options)

    @classmethod
    def qwen3_moe(
        cls, hidden_size: int, intermediate_size: int, num_experts: int = 128, top_k: int = 8, *, norm_topk_prob: bool = True,
        **options: Any,
    ) -> MoE:  # fmt: skip
        """Qwen3-MoE's block: Mixtral's, renormalised if norm_topk_prob."""
        return cls(hidden_size, intermediate_size, num_experts, top_k, renormalize=norm_topk_prob, **options)

    @classmethod
    def gpt_oss(cls, hidden_size: int, intermediate_size: int, num_experts: int = 32, top_k: int = 4, **options: Any) -> MoE:
        """gpt-oss's block: a softmax over the chosen alone, biases everywhere, clamped SwiGLU, interleaved and transposed matrices."""
        return cls(
            hidden_size, intermediate_size, num_experts, top_k, order="topk_then_score", router_bias=True, expert_bias=True,
            activation="clamped_swiglu", layout="interleaved", transposed=True, **options,
        )  # fmt: skip

    @classmethod
    def deepseek_v3(
        cls, hidden_size: int, intermediate_size: int, num_experts: int = 256, top_k: int = 8, *, num_groups: int = 8,
        top_k_groups: int = 4, scaling_factor: float = 2.5, norm_topk_prob: bool = True, num_shared_experts: int = 1, **options: Any,
    ) -> MoE:  # fmt: skip
        """DeepSeek-V3's block: sigmoid scores of float32 logits, a selection bias, groups, and shared experts as one of their size."""
        return cls(
            hidden_size, intermediate_size, num_experts, top_k, score="sigmoid", renormalize=norm_topk_prob, num_groups=num_groups,
            top_k_groups=top_k_groups, scaling_factor=scaling_factor, selection_bias=True, router_fp32=True,
            shared_intermediate_size=num_shared_experts * intermediate_size or None, **options,
        )  # fmt: skip

    @classmethod
    def from_transformers(cls, block: torch.nn.Module) -> MoE:
        """A layer with the sizes, the routing and a copy of the weights of a transformers (5) block: MixtralSparseMoeBlock,
        Qwen3MoeSparseMoeBlock, GptOssMLP or DeepseekV3MoE; its dtype, device and mode, and its frozen parameters frozen. A block that
        computes something else (another activation, gpt-oss's with other constants, Mixtral's router noise) or has parameters of several
        dtypes is refused."""
        name = type(block).__name__
        if name not in _BLOCKS or not hasattr(block, "experts"):
            checks.reject(_OP, "block", f"be one of transformers 5's {', '.join(_BLOCKS)}", name, TypeError)
        _check_fixed(block)
        parameters = _renamed(dict(block.named_parameters()))
        dtypes = sorted({str(p.dtype) for p in parameters.values()})
        if len(dtypes) > 1:
            checks.reject(_OP, "block", "have parameters of one dtype", " and ".join(dtypes), TypeError)
        weight = block.experts.down_proj
        made = _BLOCKS[name](cls, block, {"device": weight.device, "dtype": weight.dtype})
        made.load_state_dict(block.state_dict())
        for key, parameter in made.named_parameters():
            parameter.requires_grad_(parameters[key].requires_grad)
        return made.train(block.training)

    @property
    def capacity_factor(self) -> float | None:
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        """May be set at any time, as for evaluation."""
        if factor is not None:
            checks.check_number(_OP, "capacity_factor", factor)
            if not 0.0 < factor < math.inf:
                checks.reject(_OP, "capacity_factor", "be None or positive and finite", factor)
            # E times the share is all slots; the bounds keep the product with their number within 64 bits.
            self._capacity = Fraction(str(min(factor, self.num_experts))).limit_denominator(10**6)
        self._capacity_factor = factor

    def reset_parameters(self) -> None:
        """As torch's linear layers, and no selection bias: also what fills a layer that was made on the meta device."""
        for module in self.children():
            module.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, MoEAux]:
        checks.check_tensor(_OP, "x", x)
        checks.check_dtype(_OP, "x", x)
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            checks.reject(_OP, "x", f"have shape (…, H) with H = {self.hidden_size}", checks.shape(x))
        tokens = x.reshape(-1, self.hidden_size)
        logits = self.gate(tokens)
        bias = self.gate.e_score_correction_bias
        weights, indices, plan = moe_route(logits, self.top_k, bias=bias, **self.routing, return_plan=True)
        if self.capacity_factor is not None:
            out = self.experts(tokens, self._within_capacity(indices, plan), weights)
        elif type(self.experts).forward is Experts.forward:
            out = self.experts(tokens, indices, weights, plan)
        else:  # of a caller's own, by transformers' signature
            out = self.experts(tokens, indices, weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view(x.shape), self._aux(logits, indices)

    def _within_capacity(self, indices: Tensor, plan: MoEPlan) -> Tensor:
        """The ids, but num_experts, which is nobody, of a slot that comes after its expert's last."""
        capacity = -(-self._capacity.numerator * indices.numel() // (self._capacity.denominator * self.num_experts))
        capacity = max(capacity, 1)  # of a share too small for its fraction
        starts = F.pad(plan.offsets[:-1], (1, 0))
        place = plan.inverse.view(indices.shape) - starts[indices]  # among the slots of its expert, which a stable sort keeps in order
        return indices.masked_fill(place >= capacity, self.num_experts)

    def _aux(self, logits: Tensor, indices: Tensor) -> MoEAux:
        logits = logits.float()
        if self.routing["score"] == "softmax":
            probs = logits.softmax(-1)
        else:
            probs = logits.sigmoid()
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        counts = moe_expert_counts(indices, self.num_experts)
        return MoEAux(load_balancing_loss_of(probs, counts), moe_z_loss(logits), counts)

    def update_bias(self, expert_counts: Tensor, rate: float = 1e-3) -> None:
        """Move the selection bias by `rate` toward experts with fewer slots than the mean, in place: once a step, on the counts of all
        ranks together."""
        if self.gate.e_score_correction_bias is None:
            checks.reject(_OP, "selection_bias", "be True to update it", False)
        moe_update_bias(self.gate.e_score_correction_bias, expert_counts, rate)

    def extra_repr(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.routing.items() if value is not None]
        return ", ".join([f"top_k={self.top_k}", f"capacity_factor={self.capacity_factor}", *shown])


def _renamed(tensors: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """gpt-oss calls `router` what is `gate` here."""
    router, gate = f"{prefix}router.", f"{prefix}gate."
    return {gate + key.removeprefix(router) if key.startswith(router) else key: value for key, value in tensors.items()}


def _adapt(module: MoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A transformers block's state_dict, in place: its router's name, and no shared expert of no size."""
    renamed = _renamed(state_dict, prefix)
    if module.shared_experts is None:
        shared = f"{prefix}shared_experts."
        empty = [key for key, t in renamed.items() if key.startswith(shared) and isinstance(t, Tensor) and t.numel() == 0]
        for key in empty:
            del renamed[key]
    state_dict.clear()
    state_dict.update(renamed)


def _check_fixed(block: Any) -> None:
    """What no option changes is in the block as it is in a layer."""
    experts = block.experts
    for owner, name, fixed in ((experts, "alpha", ALPHA), (experts, "limit", LIMIT), (block, "jitter_noise", 0.0)):
        if (value := getattr(owner, name, fixed)) != fixed:
            checks.reject(_OP, "block", f"have {name} = {fixed}", value)
    for owner in (experts, getattr(block, "shared_experts", None)):
        act_fn = type(getattr(owner, "act_fn", torch.nn.SiLU())).__name__
        if act_fn not in ("SiLU", "SiLUActivation"):
            checks.reject(_OP, "block", "have act_fn = SiLU", act_fn)


def _sizes(block: Any, router: Any) -> tuple[int, int, int, int]:
    """(H, I, E, K), of what all of these blocks have."""
    num_experts, hidden_size = router.weight.shape
    return hidden_size, block.experts.down_proj.numel() // (num_experts * hidden_size), num_experts, router.top_k


# By the class of a transformers block: the layer of its sizes.
_BLOCKS: dict[str, Callable[[type[MoE], Any, dict[str, Any]], MoE]] = {
    "MixtralSparseMoeBlock": lambda cls, block, made: cls.mixtral(*_sizes(block, block.gate), **made),
    "Qwen3MoeSparseMoeBlock": lambda cls, block, made: cls.qwen3_moe(
        *_sizes(block, block.gate), norm_topk_prob=block.gate.norm_topk_prob, **made
    ),
    "GptOssMLP": lambda cls, block, made: cls.gpt_oss(*_sizes(block, block.router), **made),
    "DeepseekV3MoE": lambda cls, block, made: cls.deepseek_v3(
        *_sizes(block, block.gate), num_groups=block.gate.num_group, top_k_groups=block.gate.topk_group,
        scaling_factor=block.gate.routed_scaling_factor, norm_topk_prob=block.gate.norm_topk_prob,
        num_shared_experts=block.shared_experts.gate_proj.out_features // _sizes(block, block.gate)[1], **made,
    ),
}  # fmt: skip
