"""Attention as a torch operator: schema, implementations by device, autograd, and the public function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastattn.cpu import attention as cpu

from . import checks
from .dispatch import checks_values, describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators, wants_gradient

# --------------------------------------------------------------------------------------------------------------------
# The two operators. Empty tensors stand in for results that were not asked for: a schema has no optional ones.

_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt? window_left, SymInt? window_right, "
    "float softmax_scale, float softcap, float dropout_p"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? attn_bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)


def _check_values(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    if cu_seqlens_q is not None and checks_values(q):
        checks.check_cu_seqlens_values("attention", "q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        checks.check_cu_seqlens_values("attention", "k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def with_contiguous_cols(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


# The kernels are imported where they run, so that `import fastattn` needs no Triton.


def _attention_fwd(
    q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, *options_and_keep_weights
):
    *options, keep_weights = options_and_keep_weights
    if log.isEnabledFor(logging.INFO):
        log.info("attention_fwd: q %s k %s v %s %s", *map(describe, (q, k, v)), _Options(*options))
    _check_values(q, k, cu_seqlens_q, cu_seqlens_k, *options[:2])
    q, k, v = map(with_contiguous_cols, (q, k, v))
    inputs = q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k
    if runs_kernels(q):
        from fastattn.kernels.attention import attention_fwd

        if keep_weights:
            raise NotImplementedError("fastattn::attention_fwd: keep_weights is for CPU tensors outside the interpreter")
        (out, lse), weights = attention_fwd(*inputs, *options), None
    else:
        out, lse, weights = cpu.attention_fwd(*inputs, *options, keep_weights)
    return out, lse, q.new_empty(0) if weights is None else weights


def _attention_bwd(
    dout, dlse, q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, out, lse, weights,
    *options_and_bias_grad,
):  # fmt: skip
    if log.isEnabledFor(logging.INFO):
        log.info("attention_bwd: q %s", describe(q))
    q, k, v = map(with_contiguous_cols, (q, k, v))
    inputs = dout, dlse, q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, out, lse
    if runs_kernels(q):
        from fastattn.kernels.attention_bwd import attention_bwd

        dq, dk, dv, dbias, dsinks = attention_bwd(*inputs, *options_and_bias_grad)
    else:
        dq, dk, dv, dbias, dsinks = cpu.attention_bwd(*inputs, weights, *options_and_bias_grad)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsinks is None else dsinks


def _attention_fwd_fake(q, k, v, *rest):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    # float64 reaches the CPU alone, through scaled_dot_product_attention
    lse = q.new_empty(lse_shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    keep_weights = rest[-1]
    if not keep_weights:
        return out, lse, q.new_empty(0)
    return out, lse, q.new_empty(*lse_shape, k.shape[1], dtype=cpu.product_dtype(q, k))


def _attention_bwd_fake(dout, dlse, q, k, v, attn_bias, alibi_slopes, sinks, *rest):
    dbias = q.new_empty(0) if not rest[-1] else attn_bias.new_empty(attn_bias.shape)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


define(
    f"attention_fwd({_INPUTS}, {_OPTIONS}, bool keep_weights) -> (Tensor out, Tensor lse, Tensor weights)",
    _attention_fwd,
    _attention_fwd_fake,
)
define(
    f"attention_bwd(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, Tensor? weights, {_OPTIONS}, bool bias_grad) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    _attention_bwd,
    _attention_bwd_fake,
)


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> int:
    """How many (query, key) pairs a window leaves, summed over rows; the exact count, not S_q·S_k/2."""
    shift = seqlen_k - seqlen_q

    def keys_before(first: int) -> int:  # Σ over rows i of min(max(first + i, 0), S_k)
        def upto(n: int) -> int:  # Σ over x = 0..n of min(x, S_k)
            return 0 if n < 0 else min(n, seqlen_k) * (min(n, seqlen_k) + 1) // 2 + max(n - seqlen_k, 0) * seqlen_k

        return upto(first + seqlen_q - 1) - upto(first - 1)

    last = seqlen_q * seqlen_k if right is None else keys_before(shift + right + 1)
    return max(last - (0 if left is None else keys_before(shift - left)), 0)


def _flops(q, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, left, right) -> tuple[int, int]:
    """Multiply-adds ×2 of one Q·Kᵀ and of one P·V over the visible pairs.

    Packed inputs whose lengths cannot be read (fake and meta tensors) count as B sequences of the longest length.
    """
    if cu_seqlens_q is None:
        lengths = [(q.shape[1], v.shape[1])] * q.shape[0]
    elif cu_seqlens_q.is_meta or isinstance(cu_seqlens_q, FakeTensor):
        lengths = [(max_seqlen_q, max_seqlen_k)] * (cu_seqlens_q.shape[0] - 1)
    else:
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    pairs = q.shape[-2] * sum(visible_pairs(*both, left, right) for both in lengths)
    return 2 * pairs * q.shape[-1], 2 * pairs * v.shape[-1]


@register_flop_formula(torch.ops.fastattn.attention_fwd, get_raw=True)
def _attention_fwd_flops(q, k, v, bias, slopes, sinks, seed, cu_q, cu_k, *options, **_) -> int:
    return sum(_flops(q, v, cu_q, cu_k, *options[:4]))


@register_flop_formula(torch.ops.fastattn.attention_bwd, get_raw=True)
def _attention_bwd_flops(
    dout, dlse, q, k, v, bias, slopes, sinks, seed, cu_q, cu_k, out, lse, weights, *options, **_
) -> int:
    qk, pv = _flops(q, v, cu_q, cu_k, *options[:4])
    softcap = options[5]
    # dQ, dK over D, and S where it is not in the weights; dP, dV over D_v
    return (2 if weights is not None and softcap == 0 else 3) * qk + 2 * pv


# --------------------------------------------------------------------------------------------------------------------
# Autograd.


class _Options(NamedTuple):
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int | None
    window_right: int | None
    softmax_scale: float
    softcap: float
    dropout_p: float


def _keeps_weights(tensors: tuple[Tensor | None, ...], options: _Options) -> bool:
    """Whether a forward that is to have a backward keeps its softmax weights for it: a choice of the CPU path's alone."""
    q, k, _, attn_bias, alibi_slopes, _, _, cu_seqlens_q, _ = tensors
    if q.device.type != "cpu" or runs_kernels(q):
        return False
    bias_grad = attn_bias is not None and attn_bias.requires_grad
    return cpu.keeps_weights(
        q, k, alibi_slopes, cu_seqlens_q, options.window_left, options.window_right, options.softcap, options.dropout_p,
        bias_grad,
    )  # fmt: skip


@differentiable
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, options, lse_used, keep_weights
    ):
        return operators.attention_fwd(
            q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, *options, keep_weights
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options, lse_used, keep_weights = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, *output)
        ctx.options, ctx.lse_used, ctx.keep_weights = options, lse_used, keep_weights

    @staticmethod
    def backward(ctx, dout, dlse, _):
        *tensors, out, lse, weights = ctx.saved_tensors
        if not ctx.keep_weights:
            weights = None
        if dout is None:
            dout = torch.zeros_like(out)
        if not ctx.lse_used:  # None in eager mode anyway, but a compiled graph brings zeros
            dlse = None
        bias_grad, sinks_grad = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        dq, dk, dv, dbias, dsinks = torch.ops.fastattn.attention_bwd(
            dout, dlse, *tensors, out, lse, weights, *ctx.options, bias_grad
        )
        grads = [dq, dk, dv, dbias if bias_grad else None, None, dsinks if sinks_grad else None]
        return *once("attention", grads, dout, dlse, *tensors[:4], tensors[5]), *[None] * 6


def draw_seed(device: torch.device) -> Tensor:
    """The seed of one dropout mask, (1,) int64 on `device`, from torch's generator: fresh at every replay of a CUDA graph."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


# What draws the seed for a tensor of a subclass, by its type: fastattn.integrations.dtensor has each shard draw its own.
seed_of: dict[type, Callable[[Tensor], Tensor]] = {}


def draw_seed_for(t: Tensor) -> Tensor:
    """`draw_seed` where t is."""
    return seed_of[type(t)](t) if type(t) in seed_of else draw_seed(t.device)


def rng_state(q: Tensor, seed: Tensor | None = None) -> Tensor:
    """(2,) int64 that begins with the seed, 0 without: how faces hand it to a backward that they are given back by their callers."""
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    if seed is not None:
        state[:1] = seed
    return state


def dropout_keep(
    seed: Tensor, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float
) -> Tensor:
    """The mask `attend` uses with this seed on the seed's device: bool (B, H, S_q, S_k), True = kept. For tests and debugging."""
    if runs_kernels(seed):
        from fastattn.reference.philox import philox_keep

        return philox_keep(int(seed), batch, num_heads, seqlen_q, seqlen_k, dropout_p, device=seed.device)
    return cpu.dropout_keep(seed, batch, num_heads, seqlen_q, seqlen_k, dropout_p)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    lse_used: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention` below its checks, for the faces with other conventions: (out, lse).

    Row i sees key j iff i + S_k − S_q − window_left ≤ j ≤ i + S_k − S_q + window_right; None is unbounded, negative is allowed (torch's
    top-left causal mask is window_right = S_q − S_k). lse_used=False promises that no gradient of lse will come: the backward is cheaper.
    """
    # One tensor in two places breaks a compiled autograd.Function: attention of x over itself, equal cu_seqlens.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    if cu_seqlens_k is not None and cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_k.view_as(cu_seqlens_k)
    attn_bias = _four_dims(attn_bias)  # here rather than in the operator so that autograd sees the view
    lengths = cu_seqlens_q, max_seqlen_q, max_seqlen_k
    options = _options(q, k, *lengths, window_left, window_right, softmax_scale, softcap, dropout_p)
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = draw_seed_for(q)
    tensors = q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k
    keep_weights = wants_gradient(*tensors) and _keeps_weights(tensors, options)
    out, lse, _ = apply("attention", _Attention, *tensors, options, lse_used, keep_weights)
    return out, lse


def check_saved(op: str, q: Tensor, v: Tensor, **saved: Tensor) -> None:
    """Reject other shapes than the forward's. saved: by the face's names the upstream gradient, the output, and the log-sum-exp."""
    out = (*q.shape[:-1], v.shape[-1])
    lse = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    for (arg, t), shape in zip(saved.items(), (out, out, lse), strict=True):
        if tuple(t.shape) != shape:
            checks.reject(op, arg, f"have shape {shape}", checks.shape(t))


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    attn_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    block: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend`'s dq, dk and dv, contiguous, for the faces whose callers have an autograd of their own. Nothing records it.

    out and lse as `attend` returned them, any strides; the other arguments as it was given them, dropout_seed among them. block: k and v
    are a block of more keys, over all of which out and lse are, as in ring attention; dq is then the block's part of a sum.
    """
    lengths = cu_seqlens_q, max_seqlen_q, max_seqlen_k
    options = _options(q, k, *lengths, window_left, window_right, softmax_scale, softcap, dropout_p)
    tensors = q, k, v, _four_dims(attn_bias), alibi_slopes, None, dropout_seed, cu_seqlens_q, cu_seqlens_k
    dlse = None
    with torch.no_grad():
        if block and not runs_kernels(q):
            # The kernels take probabilities from lse; the CPU path makes a softmax of what it is given. With the block's own (out', lse')
            # and w = exp(lse' − lse), P = w·P', and P·(dP − rowsum(dout·out)) = P'·(w·dP − rowsum(w·dout·out') + dlse').
            own_out, own_lse, _ = operators.attention_fwd(*tensors, *options, False)
            share = (own_lse - lse).exp().masked_fill(own_lse == -math.inf, 0.0)
            share_of_row = share.transpose(-1, -2).unsqueeze(-1)  # (…, H, S) beside (…, S, H, D)
            dlse = share * ((own_out.float() - out.float()) * dout.float()).sum(-1).transpose(-1, -2)
            dout, out, lse = (share_of_row * dout).to(dout.dtype), own_out, own_lse
        out, lse = out.contiguous(), lse.contiguous()  # as the kernels read them
        dq, dk, dv, _, _ = operators.attention_bwd(dout, dlse, *tensors, out, lse, None, *options, False)
    return dq, dk, dv


def _four_dims(attn_bias: Tensor | None) -> Tensor | None:
    return None if attn_bias is None else attn_bias.reshape((1,) * (4 - attn_bias.dim()) + tuple(attn_bias.shape))


def _options(
    q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k, window_left, window_right, softmax_scale, softcap, dropout_p
) -> _Options:
    length = 0 if cu_seqlens_q is not None else 1
    return _Options(
        q.shape[length] if max_seqlen_q is None else max_seqlen_q,
        k.shape[length] if max_seqlen_k is None else max_seqlen_k,
        window_left,
        window_right,
        checks.resolved_softmax_scale(softmax_scale, q.shape[-1]),
        float(softcap),
        float(dropout_p),
    )


# --------------------------------------------------------------------------------------------------------------------
# The public function.


def check_attention(
    op: str, q, k, v, attn_bias=None, alibi_slopes=None, sinks=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, *, float64: bool = False,
) -> None:  # fmt: skip
    """Raise, in the name of `op`, unless the tensors and lengths are as `attention` documents (float64: or of that dtype)."""
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        given = "cu_seqlens_q" if packed else "cu_seqlens_k"
        checks.reject(op, "cu_seqlens_q and cu_seqlens_k", "be given together", f"only {given}")
    checks.check_qkv(op, q, k, v, packed, float64)
    heads = q.shape[-2]
    if packed:
        checks.check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
        checks.check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            checks.reject(
                op, "cu_seqlens_k", f"have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}", tuple(cu_seqlens_k.shape)
            )
        batch = cu_seqlens_q.shape[0] - 1
        bounds = (
            q.shape[0] if max_seqlen_q is None else max_seqlen_q,
            k.shape[0] if max_seqlen_k is None else max_seqlen_k,
        )
        for arg, bound in zip(("max_seqlen_q", "max_seqlen_k"), bounds, strict=True):
            if not torch.compiler.is_compiling() and bound < 0:  # what came of `.item()` cannot be asked there
                checks.reject(op, arg, "not be negative", bound)
    else:
        for arg, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if bound is not None:
                checks.reject(op, arg, "be None without cu_seqlens", bound)
        batch, bounds = q.shape[0], (q.shape[1], k.shape[1])
    if attn_bias is not None:
        checks.check_tensor(op, "attn_bias", attn_bias)
        checks.check_float(op, "attn_bias", attn_bias, or_bool=True)
        checks.check_like(op, "attn_bias", attn_bias, q, dtype=False)
        letters = "(B, H, max_seqlen_q, max_seqlen_k)" if packed else "(B, H, S_q, S_k)"
        checks.check_broadcastable(op, "attn_bias", attn_bias, (batch, heads, *bounds), letters)
    if alibi_slopes is not None:
        checks.check_per_head(op, "alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), "(H,) or (B, H) = {}", q)
        if wants_gradient(alibi_slopes):
            checks.reject(op, "alibi_slopes", "not require a gradient (none is computed)", "requires_grad=True")
    if sinks is not None:
        checks.check_per_head(op, "sinks", sinks, ((heads,),), "(H,) = {}", q)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype that the surrounding autocast region asks for (a rule registered with the op would pin one dtype)."""
    device = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking about it raises
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in checks.FLOAT_DTYPES else t for t in (q, k, v))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    attn_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(softmax_scale·q·kᵀ + bias)·v, without the S_q × S_k matrix in memory.

    B sequences of S_q queries and S_k keys, H query heads over H_kv key heads (H a multiple of H_kv: grouped and multi-query attention
    need no repeated k and v), head dims D and D_v from 1 to 512. Float16, bfloat16 or float32, any strides with a contiguous last dim.

    Args:
        q: (B, S_q, H, D), or packed (T_q, H, D) with cu_seqlens_q.
        k: (B, S_k, H_kv, D), or packed (T_k, H_kv, D) with cu_seqlens_k.
        v: (B, S_k, H_kv, D_v), or packed (T_k, H_kv, D_v).
        causal: row i sees key j iff j ≤ i + S_k − S_q: aligned to the bottom right, as in flash-attn (torch's
            `scaled_dot_product_attention` aligns to the top left). For S_q = 2 and S_k = 4, and for S_q = 4 and S_k = 2::

                1 1 1 0        0 0
                1 1 1 1        0 0
                               1 0
                               1 1
        window: (left, right), inclusive counts around the same diagonal: i + S_k − S_q − left ≤ j ≤ i + S_k − S_q + right. None or −1 is
            unbounded; `causal` is right = 0.
        softmax_scale: multiplies q·kᵀ; 1/√D by default.
        softcap: with softcap > 0 the scaled scores become softcap·tanh(score/softcap), before any bias or mask.
        attn_bias: bool (True = attend) or float (added to the scores), broadcastable to (B, H, S_q, S_k); packed, to
            (B, H, max_seqlen_q, max_seqlen_k), indexed by the positions inside each sequence. A float bias gets its gradient, summed
            over the dims it was broadcast along.
        alibi_slopes: (H,) or (B, H); adds −slope·|i + S_k − S_q − j| to the scores. No gradient.
        sinks: (H,), one logit a head that joins the softmax's denominator and has no value (float, read as fp32); gets its gradient.
        dropout_p: probability of dropping an attention weight, in [0, 1); kept weights are divided by 1 − dropout_p. The mask is
            counter-based (Philox) with a seed from torch's generator: equal in forward and backward, reproducible by
            `torch.manual_seed`. There is no training flag: pass 0.0 for evaluation.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, starting at 0: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Values are
            checked on the CPU, and on CUDA only under FASTATTN_CHECK=1 (it synchronises); kernels stay in bounds regardless.
        max_seqlen_q, max_seqlen_k: upper bounds of the packed lengths; None takes the total token count. Never a host sync.
        deterministic: True promises gradients without float atomics, equal bit for bit from run to run. False permits atomics where
            they are faster; no kernel uses them today.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out: q's shape with D_v as its last dim, q's dtype. A row that sees no key is 0, and so are its gradients; this includes rows past
            cu_seqlens_q[-1].
        lse (with return_lse): natural logarithm, float32, (B, H, S_q) or (H, T_q), differentiable; it includes the sink; −inf for a row
            that sees no key (the sink's logit with sinks).

    Numerics: products accumulate in fp32, the softmax runs in fp32 (base 2 inside); float32 inputs follow
    `torch.get_float32_matmul_precision()`. Double backward and forward-mode AD raise.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else. NotImplementedError: double backward.

    Sources: Milakov and Gimelshein, arXiv 1805.02867 (online softmax); Dao et al., arXiv 2205.14135 and 2307.08691; Shah et al.,
    arXiv 2407.08608 (softmax under the matmul).

    Example:
        >>> q, k, v = (torch.randn(2, 128, 8, 64) for _ in range(3))
        >>> out = fastattn.attention(q, k, v, causal=True)
    """
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = _autocast(q, k, v)
    if max_seqlen_q is not None:
        max_seqlen_q = checks.integer("attention", "max_seqlen_q", max_seqlen_q, "be an int or None")
    if max_seqlen_k is not None:
        max_seqlen_k = checks.integer("attention", "max_seqlen_k", max_seqlen_k, "be an int or None")
    check_attention("attention", q, k, v, attn_bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    window_left, window_right = checks.check_scores("attention", causal, window, softmax_scale, softcap)
    checks.check_probability("attention", "dropout_p", dropout_p)
    out, lse = attend(
        q,
        k,
        v,
        attn_bias=attn_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window_left=window_left,
        window_right=window_right,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        lse_used=return_lse,
    )
    return (out, lse) if return_lse else out
