"""Liger-Kernel's row ops on fastattn's kernels: its functions and modules by their names and signatures, of liger-kernel 0.8.

    from fastattn.integrations.liger import LigerRMSNorm, liger_rope          # was: from liger_kernel.transformers import LigerRMSNorm

What differs, beside the kernels: rows of any length; no gradient is written over another tensor (in_place changes nothing); in half
precision a norm's sums, and its statistics, are fp32 whatever casting_mode says. X and W may have different dtypes.

An option that is not there raises NotImplementedError naming it; other errors are those of the fastattn op, and of Liger's own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.glu import geglu, swiglu
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.norm import add_rms_norm, layer_norm, rms_norm
from fastattn.ops.rotary import apply_rotary
from fastattn.ops.softmax import softmax

CASTING_MODES = ("llama", "gemma", "none")


def _refuse(op: str, **options: Any) -> None:
    """Raise for the first option that is set."""
    for name, option in options.items():
        if option is not None and option is not False:
            raise NotImplementedError(f"{op}: {name} is not supported, got {option!r}")


# --------------------------------------------------------------------------------------------------------------------
# Norms, activations, rotary embedding, softmax.


def liger_rms_norm(
    X: Tensor, W: Tensor | None, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> Tensor:
    """X/√(mean X² + eps)·(W + offset) over the last dim, in X's dtype.

    casting_mode: "llama" rounds the normalised value to X's dtype before W multiplies it; "gemma", and "none", round once.
    """
    return rms_norm(X, X.shape[-1], W, eps, **_casting("liger_rms_norm", offset, casting_mode)).to(X.dtype)


def liger_fused_add_rms_norm(
    X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> tuple[Tensor, Tensor]:
    """(liger_rms_norm(S), S) with S = X + R."""
    y, s = add_rms_norm(X, R, X.shape[-1], W, eps, **_casting("liger_fused_add_rms_norm", offset, casting_mode))
    return y.to(X.dtype), s


def _casting(op: str, offset: float, casting_mode: str) -> dict[str, Any]:
    if casting_mode not in CASTING_MODES:
        raise ValueError(f"{op}: casting_mode must be one of {', '.join(CASTING_MODES)}, got {casting_mode!r}")
    return {"weight_offset": offset, "cast_before_weight": casting_mode == "llama"}


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    """(X − mean X)/√(var X + eps)·W + B over the last dim."""
    return layer_norm(X, X.shape[-1], W, B, eps).to(X.dtype)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a)·b."""
    return swiglu(a, b)


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """gelu(a)·b, gelu by its tanh approximation."""
    return geglu(a, b, approximate="tanh")


def liger_softmax(x: Tensor) -> Tensor:
    """softmax over the last dim."""
    return softmax(x, -1).to(x.dtype)


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, S, D) and k (B, H_kv, S, D), any strides, rotated as Llama rotates them in transformers.

    cos, sin: (S, R), (1, S, R) or (B, S, R), each angle twice, as transformers makes them; with rotary_dim = R also (…, R/2), as gpt-oss
    has them. position_ids: not read, as in Liger, since the tables are the positions' already.

    Raises: NotImplementedError for an unsqueeze_dim other than 1.
    """
    _refuse("liger_rope", unsqueeze_dim=None if unsqueeze_dim == 1 else unsqueeze_dim)
    half = (cos.shape[-1] if rotary_dim is None else rotary_dim) // 2
    q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos[..., :half], sin[..., :half])
    return q.transpose(1, 2), k.transpose(1, 2)


liger_rotary_pos_emb = liger_rope


class _Function:
    """What is called as an autograd.Function is: by `apply`."""

    def __init__(self, function: Callable) -> None:
        self.apply = function


LigerRMSNormFunction = _Function(lambda X, W, eps, *options: liger_rms_norm(X, W, eps, *options[:3]))  # the fourth is row_mode
LigerFusedAddRMSNormFunction = _Function(liger_fused_add_rms_norm)
LigerLayerNormFunction = _Function(liger_layer_norm)
LigerSiLUMulFunction = _Function(liger_swiglu)
LigerGELUMulFunction = _Function(liger_geglu)
LigerSoftmaxFunction = _Function(liger_softmax)
LigerRopeFunction = _Function(liger_rope)


# --------------------------------------------------------------------------------------------------------------------
# Losses.


@dataclass
class CrossEntropyOutput:
    """A loss and, where they were asked for, what goes with it."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of logits (T, V), plus lse_square_scale·lse²; with return_z_loss a CrossEntropyOutput.

    size_average, reduce: without effect, as in Liger. return_token_accuracy, return_predicted_tokens: NotImplementedError.
    """
    op = "liger_cross_entropy"
    _refuse(op, return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens)
    _refuse_weighted_z_loss(op, weight, lse_square_scale)
    options = dict(z_loss=lse_square_scale, softcap=softcap or 0.0)
    result = cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, return_lse=return_z_loss, **options)
    return _with_z_loss(*result, target, ignore_index, reduction, lse_square_scale) if return_z_loss else result


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """`liger_cross_entropy` of input (T, H)·weightᵀ (V, H) + bias (V,), without the logits in memory.

    accum_dtype: the weight's gradient is summed in fp32 whatever it says. chunk_mem_const: without effect. use_token_scaling,
    return_token_accuracy, return_predicted_tokens: NotImplementedError.
    """
    op = "liger_fused_linear_cross_entropy"
    _refuse(
        op, use_token_scaling=use_token_scaling, return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )  # fmt: skip
    _refuse_weighted_z_loss(op, ce_weight, lse_square_scale)
    result = linear_cross_entropy(
        input, weight, target, linear_bias=bias, weight=ce_weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=lse_square_scale, softcap=softcap or 0.0, return_lse=return_z_loss,
    )  # fmt: skip
    return _with_z_loss(*result, target, ignore_index, reduction, lse_square_scale) if return_z_loss else result


def _refuse_weighted_z_loss(op: str, weight: Tensor | None, lse_square_scale: float) -> None:
    if weight is not None and lse_square_scale:  # Liger divides the two parts of a mean by different sums
        raise NotImplementedError(f"{op}: class weights together with lse_square_scale are not supported")


def _with_z_loss(
    loss: Tensor, lse: Tensor, target: Tensor, ignore_index: int, reduction: str, lse_square_scale: float
) -> CrossEntropyOutput:
    counts = target != ignore_index
    z_loss = (lse_square_scale * lse.detach().square()).masked_fill(~counts, 0.0)
    if reduction != "none":
        z_loss = z_loss.sum() / (counts.sum() if reduction == "mean" else 1)
    return CrossEntropyOutput(loss, z_loss.to(loss.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Modules.


def _initial(op: str, hidden_size: int, init_fn: str) -> nn.Parameter:
    if init_fn not in ("ones", "zeros"):
        raise ValueError(f"{op}: init_fn must be 'ones' or 'zeros', got {init_fn!r}")
    return nn.Parameter(torch.ones(hidden_size) if init_fn == "ones" else torch.zeros(hidden_size))


class LigerRMSNorm(nn.Module):
    """`liger_rms_norm` with a weight. in_place, row_mode: without effect."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        _casting("LigerRMSNorm", offset, casting_mode)
        self.register_parameter("weight", _initial("LigerRMSNorm", hidden_size, init_fn) if elementwise_affine else None)
        self.variance_epsilon, self.offset, self.casting_mode = eps, offset, casting_mode
        self.in_place, self.row_mode, self.elementwise_affine = in_place, row_mode, elementwise_affine

    def forward(self, hidden_states: Tensor) -> Tensor:
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode)


class LigerLayerNorm(nn.Module):
    """`liger_layer_norm` with its parameters; the bias is drawn from a normal distribution with bias=True, and 0 without, as Liger's.

    impl, mode, backend, by which Liger chooses a kernel: NotImplementedError.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _refuse("LigerLayerNorm", impl=impl, mode=mode, backend=backend)
        self.hidden_size, self.eps, self.variance_epsilon = hidden_size, eps, eps
        self.weight = _initial("LigerLayerNorm", hidden_size, init_fn)
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return liger_layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)


class LigerSoftmax(nn.Module):
    """`liger_softmax`."""

    def forward(self, x: Tensor) -> Tensor:
        return liger_softmax(x)


class _GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x))·up_proj(x)), from a config with hidden_size and intermediate_size."""

    activation: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(type(self).activation(self.gate_proj(x), self.up_proj(x)))


class LigerSwiGLUMLP(_GatedMLP):
    """Llama's MLP. config.hidden_act must be "silu" or "swish"."""

    activation = staticmethod(liger_swiglu)

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"LigerSwiGLUMLP: config.hidden_act must be 'silu' or 'swish', got {config.hidden_act!r}")


class LigerGEGLUMLP(_GatedMLP):
    """Gemma's MLP, its gelu by the tanh approximation whatever the config says."""

    activation = staticmethod(liger_geglu)

    def __init__(self, config: Any) -> None:
        super().__init__(config)


class LigerCrossEntropyLoss(nn.Module):
    """`liger_cross_entropy` with its options: forward(logits, target)."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _refuse("LigerCrossEntropyLoss", return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens)
        self.weight, self.ignore_index, self.lse_square_scale = weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap, self.return_z_loss = label_smoothing, reduction, softcap, return_z_loss

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        return liger_cross_entropy(
            _input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing, self.lse_square_scale,
            self.softcap, self.return_z_loss,
        )  # fmt: skip


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_fused_linear_cross_entropy` with its options: forward(lin_weight, hidden_states, target, bias=None)."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _refuse(
            "LigerFusedLinearCrossEntropyLoss", use_token_scaling=use_token_scaling, return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype = return_z_loss, accum_dtype

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor | CrossEntropyOutput:
        return liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.ce_weight, self.ignore_index, self.lse_square_scale, self.label_smoothing,
            self.reduction, self.softcap, self.return_z_loss, self.accum_dtype,
        )  # fmt: skip
