"""Attention on the CPU, forward and backward, in memory linear in the sequence lengths.

Three ways. Where only additive terms come between q k^T and the softmax (`_fused_fits`), torch's fused CPU
op does the work: in one call, or in one a chunk of rows where a mask has to be made for it. What else short sequences
have, windows and sinks too (`_compiled_fits`), csrc/cpu/attention.cpp does where it is built, forward and backward. Otherwise each chunk is
three plain steps, scores, softmax and the product with v. The backward repeats the first two before its own, unless the
forward was told to keep its weights: then the whole call is one chunk. Either way about `_CHUNK_ELEMENTS` scores or mask
entries exist at a time, and only of keys that some row of the chunk can see.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastattn.extensions import cpu_operators, in_rows


def _torchs_own(operator: str) -> Callable:
    """What torch has for an operator on the CPU now, and not what is registered over it later: fastattn.integrations.torch_sdpa does
    that, and what it registers ends up here."""
    kernel = torch.library.get_kernel(operator, "CPU")
    return functools.partial(kernel.call_boxed, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))


_fused_forward = _torchs_own("aten::_scaled_dot_product_flash_attention_for_cpu")
_fused_backward = _torchs_own("aten::_scaled_dot_product_flash_attention_for_cpu_backward")

# 4 MB in float32. Larger chunks were no faster: the allocator hands big buffers back to the system each time, and the
# page faults then cost more than the arithmetic.
_CHUNK_ELEMENTS = 1 << 20
_CHUNK_ROWS = 256  # aimed at: fewer waste the matmuls' blocking, more waste work on scores that a window masks
_FUSED_MIN_ROWS = 32  # the fused op's own smallest block of rows
_COMPILED_ELEMENTS = 1 << 16  # of a head's scores (with those that share its keys): more, and torch's large products win
_COMPILED_KEYS = 1 << 10  # which a thread holds several copies of

_OF_COMPILED = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed{}, int? window_left, int? window_right, float softmax_scale, float softcap, "
    "float dropout_p"
)
cpu_operators.define(f"attention_fwd_cpp(Tensor q, Tensor k, Tensor v, {_OF_COMPILED.format('')}) -> (Tensor out, Tensor lse)")
cpu_operators.define(
    f"attention_bwd_cpp(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_OF_COMPILED.format(', Tensor lse')}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor delta)"
)


class _Mask(NamedTuple):
    """Which scores of a dense batch count, and what is added to them.

    bias (B|1, H|1, S_q|1, S_k|1), float or bool, or None; slopes (B|1, H) or None; left and right: None where the
    window's side excludes nothing.
    """

    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    left: int | None
    right: int | None

    def as_is_causal(self, shift: int) -> bool | None:
        """torch's is_causal flag where that says all there is to say, else None. shift is S_k - S_q."""
        if self.bias is None and self.slopes is None and self.left is None and self.right in (None, -shift):
            return self.right is not None  # a right side of -shift puts row 0 on key 0: top-left causal
        return None


class _Dropout(NamedTuple):
    """p in 65536ths, as `_keep` compares it, and what names the mask: the seed, and the dense batch's place in the call."""

    p: float
    seed: int
    batch_start: int


def keeps_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> bool:
    """Whether a forward with a backward to come should keep its softmax weights for it.

    Only where they are no more than a chunk's scores, so that memory stays linear in the sequence lengths, and dense.
    Not where torch's fused op does both directions, nor where a window spares chunks of rows more than keeping does.
    """
    elements = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if cu_seqlens_q is not None or elements * product_dtype(q, k).itemsize > 4 * _CHUNK_ELEMENTS:
        return False
    window = window_left, window_right
    if not bias_grad and _compiled_fits(q, k, None, alibi_slopes, None, cu_seqlens_q, window, softcap, dropout_p):
        return False
    if q.shape[1] > _CHUNK_ROWS and not (window_left is None and window_right is None):
        return False
    return not (_fused_fits(alibi_slopes, softcap, dropout_p) and _fused_backward_fits(q.dtype, bias_grad))


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    window_left: int | None,
    window_right: int | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    keep_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention's output, its log-sum-exp and, for a backward, its softmax weights or None; nothing is validated here.

    q (B, S_q, H, D), k (B, S_k, H_kv, D), v (B, S_k, H_kv, D_v) of one float dtype and any strides, or packed (T, H, D)
    with cu_seqlens. window_left and window_right are None (unbounded) or any integer, bottom-right aligned.
    Returns out, contiguous, (B, S_q, H, D_v) or (T, H, D_v), in q's dtype; lse, contiguous, natural log, (B, H, S_q) or
    (H, T), float32 (float64 for float64 inputs). Accumulates in float32. With keep_weights, which dense calls may ask for
    where `keeps_weights` says so: the weights, (B, H, S_q, S_k) in `product_dtype`, dropped ones with a minus sign.
    """
    window = window_left, window_right
    if not keep_weights and _compiled_fits(q, k, attn_bias, alibi_slopes, sinks, cu_seqlens_q, window, softcap, dropout_p):
        tensors = *map(in_rows, (q, k, v)), contiguous_floats(alibi_slopes), contiguous_floats(sinks), dropout_seed
        options = window_left, window_right, softmax_scale, softcap, _resolved(dropout_p)
        return *torch.ops.fastattn.attention_fwd_cpp(*tensors, *options), None
    unmodified = cu_seqlens_q is None and sinks is None and softcap == dropout_p == 0 and not keep_weights
    causal = _one_call(q, k, v, attn_bias, alibi_slopes, window_left, window_right) if unmodified else None
    if causal is not None:
        results = _forward_in_one_call(q, k, v, causal, softmax_scale)
        if results is not None:
            return *results, None
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=_accumulation_dtype(q.dtype), device=q.device)
    weights = q.new_empty(*lse_shape, k.shape[1], dtype=product_dtype(q, k)) if keep_weights else None
    for (q_, out_), (k_, v_), (lse_,), mask, _, dropout in _dense_batches(
        (q, out), (k, v), (lse,), attn_bias, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k,
        window_left, window_right, dropout_seed, dropout_p,
    ):  # fmt: skip
        if sinks is not None:  # for the rows that see no key, and so are in no chunk
            lse_.copy_(sinks[:, None])
        if q_.numel() == 0 or k_.shape[1] == 0:
            continue
        # A sink would have the fused op's output rounded twice, which half precision can't afford.
        fused = _fused_fits(mask.slopes, softcap, dropout.p) and not (sinks is not None and _is_half(q.dtype))
        if keep_weights or not (fused and _forward_fused(q_, k_, v_, mask, sinks, softmax_scale, out_, lse_)):
            weights = _forward_chunked(
                q_, k_, v_, mask, sinks, dropout, softmax_scale, softcap, out_, lse_, keep_weights
            )
    return out, lse, weights


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    window_left: int | None,
    window_right: int | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`attention_fwd`: dq, dk, dv, contiguous, in their inputs' shapes and dtypes; dbias or None;
    dsinks or None.

    dout and dlse have out's and lse's shapes and any strides; dlse may be None, and so may weights. dbias (attn_bias's shape and dtype) is
    computed where ``bias_grad``; dsinks (sinks' dtype) where sinks are given.
    """
    window = window_left, window_right
    if weights is None and _compiled_fits(q, k, attn_bias, alibi_slopes, sinks, cu_seqlens_q, window, softcap, dropout_p):
        dq, dk, dv, delta = torch.ops.fastattn.attention_bwd_cpp(
            in_rows(dout), contiguous_floats(dlse), *map(in_rows, (q, k, v)), contiguous_floats(alibi_slopes),
            contiguous_floats(sinks), dropout_seed, contiguous_floats(lse), window_left, window_right, softmax_scale, softcap,
            _resolved(dropout_p),
        )  # fmt: skip
        return dq, dk, dv, None, None if sinks is None else _sinks_gradient(sinks, lse, delta, dlse)
    fusable = weights is None and dlse is None and _fused_backward_fits(q.dtype, bias_grad)
    unmodified = cu_seqlens_q is None and sinks is None and softcap == dropout_p == 0
    causal = _one_call(q, k, v, attn_bias, alibi_slopes, window_left, window_right) if fusable and unmodified else None
    if causal is not None:
        return *_backward_in_one_call(dout, q, k, v, out, lse, causal, softmax_scale), None, None
    if dlse is not None:  # no key, no gradient, whatever dlse holds there
        dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    accumulate = _accumulation_dtype(q.dtype)
    dbias = torch.zeros(attn_bias.shape, dtype=accumulate, device=q.device) if bias_grad else None
    delta = torch.zeros_like(lse)  # rowsum(P * dP), which sinks need
    of_rows = (lse, delta) if dlse is None else (lse, delta, dlse)
    for (q_, out_, dout_, dq_), (k_, v_, dk_, dv_), (lse_, delta_, *dlse_), mask, dbias_, dropout in _dense_batches(
        (q, out, dout, dq), (k, v, dk, dv), of_rows, attn_bias, alibi_slopes, dbias, cu_seqlens_q, cu_seqlens_k,
        window_left, window_right, dropout_seed, dropout_p,
    ):  # fmt: skip
        if q_.numel() == 0 or k_.shape[1] == 0:
            continue
        if fusable and _fused_fits(mask.slopes, softcap, dropout.p):
            _backward_fused(dout_, q_, k_, v_, mask, softmax_scale, out_, lse_, dq_, dk_, dv_)
            if sinks is not None:
                delta_.copy_((out_ * dout_).sum(-1).transpose(1, 2))
        else:
            _backward_chunked(
                dout_, dlse_[0] if dlse_ else None, q_, k_, v_, weights, mask, sinks, dropout, softmax_scale, softcap,
                dq_, dk_, dv_, dbias_, delta_,
            )  # fmt: skip
    if dbias is not None:
        dbias = dbias.to(attn_bias.dtype)
    return dq, dk, dv, dbias, None if sinks is None else _sinks_gradient(sinks, lse, delta, dlse)


def _sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """A sink has a share of every row's sum, and no value."""
    share = _exp_difference(sinks.to(lse.dtype)[:, None], lse)
    dsinks = share * (-delta if dlse is None else dlse - delta)
    return dsinks.transpose(-1, -2).reshape(-1, sinks.shape[0]).sum(0).to(sinks.dtype)


def _compiled_fits(
    q, k, bias, slopes, sinks, cu_seqlens_q, window: tuple[int | None, int | None], softcap: float, dropout_p: float
) -> bool:
    """Whether a call is short, dense, and of what neither torch's fused op nor its products do as well."""
    reach = q.shape[1] + k.shape[1]  # of a window that hides nothing
    left, right = (None if bound is None or bound >= reach else bound for bound in window)
    plain = sinks is None and left is None and right in (None, 0) and _fused_fits(slopes, softcap, dropout_p)
    if plain or bias is not None or cu_seqlens_q is not None or q.dtype == torch.float64:
        return False
    (_, seqlen_q, num_heads, _), (_, seqlen_k, num_kv_heads, _) = q.shape, k.shape
    if min(q.numel(), k.numel()) == 0 or seqlen_k > _COMPILED_KEYS:
        return False
    if seqlen_q * (num_heads // num_kv_heads) * seqlen_k > _COMPILED_ELEMENTS:
        return False
    return cpu_operators.available("attention_fwd_cpp")


def contiguous_floats(t: torch.Tensor | None) -> torch.Tensor | None:
    """As the compiled operators read all but queries, keys and values."""
    return None if t is None else t.float().contiguous()


def dropout_keep(
    seed: torch.Tensor | int, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float
) -> torch.Tensor:
    """The dropout mask used above under that seed: bool (B, H, S_q, S_k), True where a probability is kept.

    Packed: sequence b's rows and columns are positions local to it.
    """
    everything = _Chunk(slice(0, batch), slice(0, num_heads), slice(0, seqlen_q), slice(0, seqlen_k))
    return _keep(_Dropout(_resolved(dropout_p), int(seed), 0), num_heads, everything, torch.bool)


def _resolved(dropout_p: float) -> float:
    """The nearest probability below 1 that 16 bits can tell, so that 1 / (1 - p) makes up for exactly what is dropped."""
    return min(round(dropout_p * 2**16), 2**16 - 1) / 2**16


# What a call consists of: dense batches, and their chunks.


def _dense_batches(
    of_queries, of_keys, lses, attn_bias, alibi_slopes, dbias, cu_seqlens_q, cu_seqlens_k, left, right,
    dropout_seed, dropout_p,
) -> Iterator[tuple]:  # fmt: skip
    """The call as dense batches, one, or one a run of packed sequences of equal lengths: views of the tensors, mask, dbias, dropout."""
    bias, dbias = _four_dims(attn_bias), _four_dims(dbias)
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(-1, alibi_slopes.shape[-1])
    seed = int(dropout_seed) if dropout_p > 0 else 0
    dropout_p = _resolved(dropout_p)

    if cu_seqlens_q is None:
        seqlen_q, seqlen_k = of_queries[0].shape[1], of_keys[0].shape[1]
        mask = _mask(bias, slopes, left, right, seqlen_q, seqlen_k)
        yield of_queries, of_keys, lses, mask, dbias, _Dropout(dropout_p, seed, 0)
        return
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [(b - a, d - c) for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])]
    b = 0
    for (seqlen_q, seqlen_k), run in itertools.groupby(lengths):
        end = b + len(list(run))
        rows, keys = slice(starts_q[b], starts_q[end]), slice(starts_k[b], starts_k[end])
        place = slice(b, end), slice(None), slice(seqlen_q), slice(seqlen_k)
        yield (
            [t[rows].unflatten(0, (end - b, seqlen_q)) for t in of_queries],
            [t[keys].unflatten(0, (end - b, seqlen_k)) for t in of_keys],
            [t[:, rows].unflatten(1, (end - b, seqlen_q)).transpose(0, 1) for t in lses],
            _mask(_part(bias, *place), _part(slopes, *place), left, right, seqlen_q, seqlen_k),
            _part(dbias, *place),
            _Dropout(dropout_p, seed, b),
        )
        b = end


def _mask(bias, slopes, left: int | None, right: int | None, seqlen_q: int, seqlen_k: int) -> _Mask:
    """A mask without the sides that exclude nothing at these lengths."""
    left = None if left is None or left >= seqlen_k - 1 else left
    right = None if right is None or right >= seqlen_q - 1 else right
    return _Mask(bias, slopes, left, right)


def _row_chunks(seqlen_q: int, seqlen_k: int, mask: _Mask, rows: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of rows, each with the keys that any of its rows sees; those that see none are left out."""
    shift = seqlen_k - seqlen_q
    for start in range(0, seqlen_q, rows):
        stop = min(start + rows, seqlen_q)
        first = 0 if mask.left is None else max(0, start + shift - mask.left)
        last = seqlen_k if mask.right is None else min(seqlen_k, stop + shift + mask.right)
        if first < last:
            yield slice(start, stop), slice(first, last)


def _mask_window(scores: torch.Tensor, mask: _Mask, rows: slice, keys: slice, shift: int) -> None:
    """Writes -inf over a chunk's (..., rows, keys) scores outside the window, touching only columns that it cuts."""

    def cut(first, last, outside):
        first, last = max(first, keys.start), min(last, keys.stop)
        if first < last:
            rows_own = torch.arange(rows.start + shift, rows.stop + shift, device=scores.device)[:, None]
            columns = torch.arange(first, last, device=scores.device)
            scores[..., first - keys.start : last - keys.start].masked_fill_(outside(columns - rows_own), -math.inf)

    if mask.right is not None:
        cut(rows.start + shift + mask.right + 1, keys.stop, lambda distance: distance > mask.right)
    if mask.left is not None:
        cut(keys.start, rows.stop - 1 + shift - mask.left, lambda distance: distance < -mask.left)


def _part(t: torch.Tensor | None, *slices: slice) -> torch.Tensor | None:
    """A view of t's part at these slices of its leading dims, the whole of a dim where it broadcasts."""
    if t is None:
        return None
    return t[tuple(slice(None) if size == 1 else s for size, s in zip(t.shape, slices, strict=False))]


def _four_dims(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t[(None,) * (4 - t.dim())]


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Through torch's fused op, which takes (B, H, S, D), masks (B|1, H|1, S_q|1, S_k|1) and top-left causal.


def _fused_fits(slopes: torch.Tensor | None, softcap: float, dropout_p: float) -> bool:
    # Slopes could go into its mask, but that is one of its own for every head.
    return softcap == 0 and dropout_p == 0 and slopes is None


def _fused_backward_fits(dtype: torch.dtype, bias_grad: bool) -> bool:
    # In half precision torch's fused backward adds up dk and dv in that precision, with several times naive's error.
    return not bias_grad and not _is_half(dtype)


def _fused_chunks(q, k, mask: _Mask) -> Iterator[tuple[slice, slice, torch.Tensor | None, bool]]:
    """Rows, keys, additive mask and is_causal of each call to be made."""
    seqlen_q, seqlen_k, bias = q.shape[1], k.shape[1], mask.bias
    shift = seqlen_k - seqlen_q
    everything = slice(0, seqlen_q), slice(0, seqlen_k)
    windowed = mask.left is not None or mask.right is not None
    causal = mask.as_is_causal(shift)
    if causal is not None:
        yield *everything, None, causal
        return
    if not windowed and (bias.dtype in (q.dtype, _accumulation_dtype(q.dtype)) or bias.numel() <= _CHUNK_ELEMENTS):
        yield *everything, _additive(bias, q.dtype), False
        return
    num_masks = 1 if bias is None else bias.shape[0] * bias.shape[1]
    num_rows = max(_FUSED_MIN_ROWS, _CHUNK_ELEMENTS // (num_masks * seqlen_k))
    for rows, keys in _row_chunks(seqlen_q, seqlen_k, mask, min(num_rows, _CHUNK_ROWS) if windowed else num_rows):
        if bias is None:
            additive = q.new_zeros(
                1, 1, rows.stop - rows.start, keys.stop - keys.start, dtype=_accumulation_dtype(q.dtype)
            )
        else:
            additive = _additive(_part(bias, slice(None), slice(None), rows, keys), q.dtype)
        if windowed:
            if bias is not None:
                shape = *additive.shape[:2], rows.stop - rows.start, keys.stop - keys.start
                additive = additive.expand(shape).clone()
            _mask_window(additive, mask, rows, keys, shift)
        yield rows, keys, additive, False


def _additive(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias as the fused op takes it: in the inputs' dtype or their accumulation dtype, copied only where needed."""
    accumulate = _accumulation_dtype(dtype)
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, dtype=accumulate, device=bias.device).masked_fill_(~bias, -math.inf)
    return bias if bias.dtype == dtype else bias.to(accumulate)


def _fused_inputs(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(B, S, H, any D) tensors as the fused op needs them: (B, H, S, D) views, one D for all, last stride 1."""
    head_dim = max(t.shape[-1] for t in tensors)
    tensors = (t if t.shape[-1] == head_dim else F.pad(t, (0, head_dim - t.shape[-1])) for t in tensors)
    return [in_rows(t).transpose(1, 2) for t in tensors]


def _one_call(q, k, v, bias, slopes, left, right) -> bool | None:
    """is_causal of the fused op's call that is the whole of a dense one without sinks, softcap and dropout, else None."""
    if q.numel() == 0 or k.numel() == 0 or v.shape[-1] != q.shape[-1]:
        return None
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    return _mask(bias, slopes, left, right, seqlen_q, seqlen_k).as_is_causal(seqlen_k - seqlen_q)


def _forward_in_one_call(q, k, v, causal, scale) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out and lse as the fused op allocates them; None where it was misled."""
    q, k, v = _fused_inputs(q, k, v)
    out, lse = _fused_forward(q, k, v, 0.0, causal, attn_mask=None, scale=scale)
    return None if _misled(lse, q, k) else (out.transpose(1, 2).contiguous(), lse.contiguous())


def _backward_in_one_call(dout, q, k, v, out, lse, causal, scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, out, dout = _fused_inputs(q, k, v, out, dout)
    grads = _fused_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale)
    return tuple(grad.transpose(1, 2).contiguous() for grad in grads)


def _forward_fused(q, k, v, mask, sinks, scale, out, lse) -> bool:
    """Whether out and lse were written; not where NaN or infinities in the inputs made the fused op err."""
    chunks = _fused_chunks(q, k, mask)
    q, k, v_ = _fused_inputs(q, k, v)
    for rows, keys, additive, causal in chunks:
        out_, lse_ = _fused_forward(
            q[:, :, rows], k[:, :, keys], v_[:, :, keys], 0.0, causal, attn_mask=additive, scale=scale
        )
        if additive is not None:  # for a row that sees nothing the fused op has lse 0, and out 0 unless v holds a NaN
            empty = additive.amax(-1) == -math.inf
            lse_ = lse_.masked_fill(empty, -math.inf)
            out_ = out_.masked_fill(empty.unsqueeze(-1), 0.0)
        if _misled(lse_, q, k):
            return False
        if sinks is not None:
            lse_of_keys, lse_ = lse_, torch.logaddexp(lse_, sinks.to(lse_.dtype)[:, None])
            out_ = out_ * _exp_difference(lse_of_keys, lse_).unsqueeze(-1)
        out[:, rows] = out_.transpose(1, 2)[..., : v.shape[-1]]
        lse[:, :, rows] = lse_
    return True


def _misled(lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the fused op may have got values wrong that are not finite.

    It adds its mask, so that a NaN in a hidden key makes the row's lse NaN; and a row with nothing but NaN counts as one
    that sees no key, its lse 0. Both are rare, and only then is a pass over the inputs needed.
    """
    if lse.abs().amin().item() > 0:  # false for a NaN
        return False
    return not math.isfinite((q.sum() + k.sum()).item())


def _backward_fused(dout, q, k, v, mask, scale, out, lse, dq, dk, dv) -> None:
    # The fused op derives each row's share of the gradient from out, and its probabilities from lse: given those that
    # include sinks, its gradients do so too.
    chunks = _fused_chunks(q, k, mask)
    q, k, v, out, dout = _fused_inputs(q, k, v, out, dout)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    for rows, keys, additive, causal in chunks:
        dq_, dk_, dv_ = _fused_backward(
            dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            0.0, causal, attn_mask=additive, scale=scale,
        )  # fmt: skip
        dq[:, rows] = dq_.transpose(1, 2)[..., : dq.shape[-1]]
        dk[:, keys] += dk_.transpose(1, 2)[..., : dk.shape[-1]]
        dv[:, keys] += dv_.transpose(1, 2)[..., : dv.shape[-1]]


# In plain torch. A chunk is rows of some heads of some batch entries; query heads that share a key/value head are
# folded into its rows, so that keys and values are never repeated.


class _Chunk(NamedTuple):
    batch: slice
    heads: slice  # of the query
    rows: slice
    keys: slice


def _chunks(q, k, mask: _Mask, whole: bool) -> Iterator[tuple[slice, slice, slice, list[tuple[slice, slice]]]]:
    """Batch entries, key/value heads, their query heads, and the rows and keys to take at once; everything if whole."""
    (batch, seqlen_q, num_heads, _), (seqlen_k, num_kv_heads) = q.shape, k.shape[1:3]
    if whole:
        yield slice(0, batch), slice(0, num_kv_heads), slice(0, num_heads), [(slice(0, seqlen_q), slice(0, seqlen_k))]
        return
    group = num_heads // num_kv_heads
    num_rows = min(seqlen_q, max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // (group * seqlen_k))))
    visible = seqlen_k
    if mask.left is not None and mask.right is not None:
        visible = max(1, min(seqlen_k, num_rows + mask.left + mask.right))
    num_heads_at_once = max(1, _CHUNK_ELEMENTS // (group * min(num_rows, seqlen_q) * visible))
    step_h = min(num_kv_heads, num_heads_at_once)
    step_b = max(1, num_heads_at_once // num_kv_heads)
    row_chunks = list(_row_chunks(seqlen_q, seqlen_k, mask, num_rows))
    for b in range(0, batch, step_b):
        for h in range(0, num_kv_heads, step_h):
            stop = min(h + step_h, num_kv_heads)
            yield slice(b, min(b + step_b, batch)), slice(h, stop), slice(h * group, stop * group), row_chunks


def _fold(t: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, S, H, D) to (B * H_kv, H / H_kv * S, D)."""
    return t.to(dtype).transpose(1, 2).reshape(t.shape[0] * num_kv_heads, -1, t.shape[-1])


def _unfold(t: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """(B * H_kv, H / H_kv * S, D) to (B, S, H, D)."""
    return t.view(batch, -1, length, t.shape[-1]).transpose(1, 2)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * a @ b, accumulated and scaled in float32, then rounded to their dtype."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def product_dtype(q: torch.Tensor, k: torch.Tensor) -> torch.dtype:
    """What products are computed in, and weights kept in, but for q k^T: exp would magnify its rounding, so it is in float32."""
    # CPUs multiply float16 no faster than float32; bfloat16 they do, which counts once there is enough of it.
    if q.dtype == torch.bfloat16 and q.numel() * k.shape[1] >= 1 << 22:
        return torch.bfloat16
    return _accumulation_dtype(q.dtype)


def _chunk_scores(q, k, mask: _Mask, scale: float, softcap: float, chunk: _Chunk, shift: int):
    """Scores (b, h, rows, keys) of folded q and k with all that is added to them, and softcap's tanh (None without)."""
    batch, heads, rows, keys = chunk
    tanh = _tanh(q, k, scale / softcap) if softcap > 0 else None
    scores = _product(q, k.transpose(1, 2), scale) if tanh is None else tanh * softcap
    scores = scores.view(batch.stop - batch.start, heads.stop - heads.start, rows.stop - rows.start, -1)
    if mask.slopes is not None:
        rows_own = torch.arange(rows.start + shift, rows.stop + shift, dtype=scores.dtype, device=scores.device)
        distance = torch.arange(keys.start, keys.stop, dtype=scores.dtype, device=scores.device) - rows_own[:, None]
        scores.addcmul_(_part(mask.slopes, batch, heads).to(scores.dtype)[:, :, None, None], distance.abs_(), value=-1)
    if mask.bias is not None:
        bias = _part(mask.bias, *chunk)
        scores.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else scores.add_(bias)
    _mask_window(scores, mask, rows, keys, shift)
    return scores, tanh


def _tanh(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    return _product(q, k.transpose(1, 2), scale).tanh_()


def _softmax(
    scores, sinks: torch.Tensor | None, no_denormals: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Softmax of (b, h, rows, keys) scores and its log-sum-exp, sinks (h,) included; a row of -inf gives 0 and -inf.
    And which rows are such, None where none is.

    no_denormals rounds those to 0. ALiBi makes many, and a matmul takes ten times as long over them.
    """
    row_max = scores.amax(-1)
    probabilities = torch.softmax(scores, -1)
    if no_denormals:
        F.threshold_(probabilities, torch.finfo(probabilities.dtype).tiny, 0.0)
    empty = row_max == -math.inf
    empty = empty if empty.any() else None
    if empty is not None:
        probabilities.masked_fill_(empty.unsqueeze(-1), 0.0)
    # A row's largest probability is exp(0) / sum, so that this is row_max + log(sum), without summing once more.
    lse = row_max - probabilities.amax(-1).log_()
    if empty is not None:
        lse.masked_fill_(empty, -math.inf)
    if sinks is not None:
        lse_of_keys, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        probabilities.mul_(_exp_difference(lse_of_keys, lse).unsqueeze(-1))
    return probabilities, lse, empty


def _exp_difference(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """exp(x - total), the share of x in a sum whose logarithm is total; 0 where the sum itself is."""
    return (x - total).exp_().masked_fill_(total == -math.inf, 0.0)


def _forward_chunked(
    q, k, v, mask, sinks, dropout, scale, softcap, out, lse, keep_weights: bool
) -> torch.Tensor | None:
    """Writes out and lse. Returns the softmax weights if they are to be kept, those that were dropped with a minus sign."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    dtype, accumulate = product_dtype(q, k), _accumulation_dtype(q.dtype)
    for batch, kv_heads, heads, row_chunks in _chunks(q, k, mask, keep_weights):
        kv = kv_heads.stop - kv_heads.start
        k_, v_ = _fold(k[batch, :, kv_heads], kv, accumulate), _fold(v[batch, :, kv_heads], kv, dtype)
        sinks_ = None if sinks is None else sinks[heads]
        for rows, keys in row_chunks:
            chunk = _Chunk(batch, heads, rows, keys)
            q_ = _fold(q[batch, rows, heads], kv, accumulate)
            scores, _ = _chunk_scores(q_, k_[:, keys], mask, scale, softcap, chunk, seqlen_k - seqlen_q)
            probabilities, lse[batch, heads, rows], empty = _softmax(scores, sinks_, mask.slopes is not None)
            kept = weights = probabilities.to(dtype)
            if dropout.p > 0:
                kept = _drop(weights, _keep(dropout, q.shape[2], chunk, dtype))
                if keep_weights:
                    weights = weights.lerp_(kept, 2.0)  # 2 * kept - weights
            out_ = _product(kept.view(q_.shape[0], q_.shape[1], -1), v_[:, keys], 1.0 / (1.0 - dropout.p))
            out[batch, rows, heads] = _unfold(out_, batch.stop - batch.start, rows.stop - rows.start)
            if empty is not None:  # 0 by 0 is 0 already, unless v holds a NaN
                out[batch, rows, heads] = out[batch, rows, heads].masked_fill(empty.transpose(1, 2).unsqueeze(-1), 0.0)
    return weights if keep_weights else None


def _backward_chunked(dout, dlse, q, k, v, weights, mask, sinks, dropout, scale, softcap, dq, dk, dv, dbias, delta) -> None:
    """dS = P * (dP - delta + dlse) with delta = rowsum(P * dP); P is computed again for each chunk if it was not kept."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    dtype, accumulate = product_dtype(q, k), _accumulation_dtype(q.dtype)
    # With nothing but masks laid over the scores, this is the naive computation, and in its precision: float32 takes
    # twice as long. What else there may be takes more time than that, and more precision.
    masked_only = mask.slopes is None and (mask.bias is None or mask.bias.dtype == torch.bool)
    score_dtype = dtype if masked_only and softcap == 0 and sinks is None else accumulate
    kept_scale = 1.0 / (1.0 - dropout.p)
    for batch, kv_heads, heads, row_chunks in _chunks(q, k, mask, weights is not None):
        kv = kv_heads.stop - kv_heads.start
        k_, v_ = (_fold(t[batch, :, kv_heads], kv, dtype) for t in (k, v))
        k_of_scores = k_.to(score_dtype) if weights is None else None
        sum_dtype = accumulate if len(row_chunks) > 1 else dtype
        dk_, dv_ = (torch.zeros(t.shape, dtype=sum_dtype, device=t.device) for t in (k_, v_))
        sinks_ = None if sinks is None else sinks[heads]
        for rows, keys in row_chunks:
            chunk = _Chunk(batch, heads, rows, keys)
            q_, dout_ = (_fold(t[batch, rows, heads], kv, dtype) for t in (q, dout))
            shape = q_.shape[0], q_.shape[1], keys.stop - keys.start
            if weights is None:
                scores, tanh = _chunk_scores(
                    q_.to(score_dtype), k_of_scores[:, keys], mask, scale, softcap, chunk, seqlen_k - seqlen_q
                )
                probabilities = _softmax(scores, sinks_, mask.slopes is not None)[0].to(dtype)
            else:
                tanh = _tanh(q_, k_, scale / softcap) if softcap > 0 else None
                probabilities = weights.abs() if dropout.p > 0 else weights
            dprobabilities = _product(dout_, v_[:, keys].transpose(1, 2), kept_scale).view(probabilities.shape)
            kept = probabilities
            if dropout.p > 0:
                marks = _keep(dropout, q.shape[2], chunk, dtype) if weights is None else weights
                kept, dprobabilities = _drop(probabilities, marks), _drop(dprobabilities, marks)
            _add_product(dv_[:, keys], kept.view(shape).transpose(1, 2), dout_, kept_scale)
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, dtype)
            if sinks is not None:
                delta[batch, heads, rows] = dprobabilities.mul_(probabilities).sum(-1, dtype=accumulate)
            if dlse is not None:
                dscores.addcmul_(probabilities, dlse[batch, heads, rows].to(dtype).unsqueeze(-1))
            if dbias is not None:
                part = _part(dbias, *chunk)
                part += dscores.to(accumulate).sum_to_size(part.shape)
            dscores = dscores.view(shape)
            if tanh is not None:
                dscores = torch.ops.aten.tanh_backward(dscores, tanh)
            dscores = dscores.to(dtype)
            dq_ = _product(dscores, k_[:, keys], scale)
            dq[batch, rows, heads] = _unfold(dq_, batch.stop - batch.start, rows.stop - rows.start)
            _add_product(dk_[:, keys], dscores.transpose(1, 2), q_, scale)
        for grad, total in ((dk, dk_), (dv, dv_)):
            grad[batch, :, kv_heads] = _unfold(total, batch.stop - batch.start, seqlen_k)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """total += scale * a @ b."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)


# Dropout: a counter-based mask, so that any chunk can have its part, and the backward the forward's.


def _drop(t: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """t where marks are positive, else 0."""
    return torch.ops.aten.threshold_backward(t, marks, 0.0)


def _keep(dropout: _Dropout, num_heads: int, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
    """(batch, heads, rows, keys) of 1 where a probability is kept and 0 where it is dropped.

    Every row has two random words, a and c, and every two keys one, b. (x ^ x >> 16) * c with x = a + b is another function
    of b for each row. It has 16 bits for either key: the upper ones, mixed from all that goes into it, and the lower ones,
    as good once the upper are added to them. Philox, as on the GPU, would take longer than the attention itself.
    """
    batch, heads, rows, keys = chunk
    entries = slice(dropout.batch_start + batch.start, dropout.batch_start + batch.stop)
    quads = slice(keys.start // 4, (keys.stop + 3) // 4)  # one counter gives two words, and those numbers for four keys
    key = _splitmix64(dropout.seed)
    counters = _count(entries, num_heads << 32)[:, None, None] + _count(heads, 1 << 32)[:, None] + _count(rows, 1, key)
    words = _words(counters.unsqueeze(-1))
    x = words[..., 1:] + _words(_count(quads, 1, _splitmix64(key)))
    x.bitwise_xor_(x >> 16).mul_(words[..., :1] | 1)
    x.add_(x >> 16)
    numbers = x.view(torch.int16)[..., keys.start - 4 * quads.start : keys.stop - 4 * quads.start]
    kept = torch.empty(numbers.shape, dtype=dtype)
    return torch.ge(numbers, round(dropout.p * 2**16) - 2**15, out=kept)


_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _splitmix64(x: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014)."""
    x = (x + _GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * _MULTIPLIER_1 % 2**64
    x = (x ^ (x >> 27)) * _MULTIPLIER_2 % 2**64
    return x ^ (x >> 31)


def _count(indices: slice, step: int, key: int = 0) -> torch.Tensor:
    """step * index for each, counted on from the key's upper 62 bits, which leave room for that."""
    key >>= 2
    return torch.arange(key + indices.start * step, key + indices.stop * step, step)


def _words(counters: torch.Tensor) -> torch.Tensor:
    """(..., n) int64 counters to (..., 2 * n) random int32 words.

    By the steps above, but for torch's shift, which brings copies of the sign in: x ^ x >> n loses a bit, and 64 spare it.
    """
    x = (counters ^ (counters >> 32)).mul_(_as_int64(_MULTIPLIER_1))
    x.bitwise_xor_(x >> 29).mul_(_as_int64(_MULTIPLIER_2))
    return x.bitwise_xor_(x >> 32).view(torch.int32)


def _as_int64(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
