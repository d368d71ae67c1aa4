"""torch's scaled_dot_product_attention: its layout, its masks and its refusals, over the attention operator."""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import checks
from .attention import attend, seed_of
from .dispatch import runs_kernels

_OP = "scaled_dot_product_attention"
_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention` that never holds an S_q × S_k matrix of its own.

    N... is any number of leading batch dims, none included; they broadcast. H query heads, H_kv key heads.

    Args:
        query: (N..., H, S_q, D), float16, bfloat16 or float32; float64 too on the CPU, where torch computes it.
        key, value: (N..., H_kv, S_k, D) and (N..., H_kv, S_k, D_v), of query's dtype. H_kv is H, or 1 (it broadcasts), or with
            enable_gqa any divisor of H.
        attn_mask: broadcastable to (N..., H, S_q, S_k). bool: True = attend. Float, of query's dtype or float32: added to the scores,
            and gets its gradient. Or a `torch.nn.attention.bias.CausalBias`, which never becomes a matrix here: causal_upper_left is
            is_causal=True, whatever its size, and causal_lower_right aligns the diagonal to the last key.
        dropout_p: probability of dropping an attention weight, in [0, 1]. Always applied: pass 0.0 for evaluation.
        is_causal: row i sees key j iff j ≤ i: aligned to the top left (`fastattn.attention` aligns to the bottom right). For S_q = 2 and
            S_k = 4, and for S_q = 4 and S_k = 2::

                1 0 0 0        1 0
                1 1 0 0        1 1
                               1 1
                               1 1
        scale: multiplies query·keyᵀ; 1/√D by default.
        enable_gqa: key and value may have fewer heads than query; each serves H / H_kv consecutive query heads.

    Returns:
        (N..., H, S_q, D_v) in query's dtype. A row that may see no key is 0, as torch's own CPU paths have it, and so are its gradients;
        this includes S_k = 0 and the first rows of causal_lower_right with S_q > S_k.

    On CPU tensors this calls torch's function where torch runs its flash kernel, and our own code where torch would hold the S_q × S_k
    matrix: dropout (whose mask is then ours, not torch's), D_v ≠ D, a mask that needs a gradient; and for DTensors, for which that kernel's
    backward has no rule. Leading dims are first folded to two, so that inputs of three and five dims take the same way.

    Raises: what torch raises, also where one of its fast paths lets the same mistake through.
        RuntimeError: dtypes, devices, shapes or head counts that do not go together; attn_mask with is_causal=True; dropout_p outside
            [0, 1]; integer tensors; double backward (where our own code runs, NotImplementedError, which is a RuntimeError).
        TypeError: an argument of the wrong type; float64 on CUDA. ValueError: a head dim over 512 on CUDA.
        IndexError: enable_gqa without a head dim; a mask of less than two dims for a 4-D query.
        NotImplementedError: nested tensors; complex and 8-bit dtypes.

    Example:
        >>> query, key, value = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> out = fastattn.scaled_dot_product_attention(query, key, value, is_causal=True)
    """
    causal_bias = attn_mask if _is_causal_bias(attn_mask) else None
    overloadable = (query, key, value) if causal_bias is not None else (query, key, value, attn_mask)
    if has_torch_function(overloadable):
        args = (query, key, value, attn_mask, dropout_p, is_causal)
        return handle_torch_function(
            scaled_dot_product_attention, overloadable, *args, scale=scale, enable_gqa=enable_gqa
        )
    _check_types(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if dropout_p == 1.0:  # every weight dropped; there is no 1 / (1 − p) for the operator to scale the rest by
        return 0.0 * scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if causal_bias is not None:
        attn_mask = None
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _check_tensors(query, key, value, attn_mask)
    batch_shape = _batch_shape(query, key, value, enable_gqa)  # (N..., H), () for inputs of two dims
    if attn_mask is not None:
        _check_mask_shape(attn_mask, (*batch_shape, query.shape[-2], key.shape[-2]))

    # Fold everything to (B, H, S, D), the only rank that torch's CPU flash kernel and our kernels know.
    lead, heads = batch_shape[:-1], batch_shape[-1] if batch_shape else 1
    query = _fold(query, lead, heads)
    key = _fold(key, lead, key.shape[-3] if enable_gqa else heads)
    value = _fold(value, lead, value.shape[-3] if enable_gqa else heads)
    if key.shape[1] != value.shape[1]:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is not None:
        attn_mask = _fold_mask(attn_mask, lead)

    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    top_left = seqlen_q - seqlen_k  # row i sees key j iff j ≤ i + (S_k − S_q) + window_right
    window_right = top_left if is_causal else None
    if causal_bias is not None:
        window_right = _window_right(causal_bias, seqlen_q, seqlen_k)
        is_causal = bool(window_right == top_left)  # a bool also of symbolic sizes: torch's function takes no SymBool
    lower_right = causal_bias is not None and not is_causal

    if runs_kernels(query):
        _check_kernel_limits(query, value)
    elif type(query) not in seed_of and _torch_computes(query, key, value, attn_mask, dropout_p, lower_right):
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            causal_bias if lower_right else attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return _unfold(out, batch_shape)
    out, _ = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_bias=attn_mask,
        window_right=window_right,
        softmax_scale=scale,
        dropout_p=dropout_p,
        lse_used=False,
    )
    return _unfold(out.transpose(1, 2), batch_shape)


# --------------------------------------------------------------------------------------------------------------------
# What torch refuses, with torch's exception types.


def _check_types(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> None:
    for arg, t in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if arg == "attn_mask" and t is None:
            continue
        if not isinstance(t, Tensor):
            checks.reject(_OP, arg, "be a torch.Tensor", type(t).__name__, TypeError)
        if t.is_nested:
            must = "not be a nested tensor (fastattn.attention takes packed tensors with cu_seqlens)"
            checks.reject(_OP, arg, must, "a nested tensor", NotImplementedError)
    for arg, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            checks.reject(_OP, arg, "be a bool", type(flag).__name__, TypeError)
    for arg, number in (("dropout_p", dropout_p), ("scale", scale)):
        zero_dim = isinstance(number, Tensor) and number.dim() == 0  # torch's own parser takes one for a float
        if not (isinstance(number, _NUMBERS) or zero_dim or (arg == "scale" and number is None)):
            checks.reject(_OP, arg, "be a float", type(number).__name__, TypeError)
    if not 0.0 <= dropout_p <= 1.0:
        checks.reject(_OP, "dropout_p", "lie in [0, 1]", dropout_p, RuntimeError)
    if is_causal and attn_mask is not None:
        checks.reject(_OP, "attn_mask", "be None with is_causal=True", f"a {type(attn_mask).__name__}", RuntimeError)


def _check_tensors(query, key, value, attn_mask) -> None:
    device, dtype = query.device, query.dtype
    for arg, t in (("query", query), ("key", key), ("value", value)):
        if t.device != device:
            checks.reject(_OP, arg, f"be on query's device {device}", t.device, RuntimeError)
        if t.dtype != dtype:
            checks.reject(_OP, arg, f"have query's dtype {dtype}", t.dtype, RuntimeError)
        if t.dim() < 2:
            checks.reject(_OP, arg, "have at least 2 dims", checks.shape(t), RuntimeError)
    if dtype not in checks.FLOAT_DTYPES and dtype != torch.float64:
        error = NotImplementedError if dtype.is_complex or dtype.is_floating_point else RuntimeError
        checks.reject(_OP, "query", "be float16, bfloat16, float32 or float64", dtype, error)
    if key.shape[-1] != query.shape[-1]:
        must = f"have shape (..., S_k, D) with D = {query.shape[-1]} to match query"
        checks.reject(_OP, "key", must, checks.shape(key), RuntimeError)
    if value.shape[-2] != key.shape[-2]:
        must = f"have shape (..., S_k, D_v) with S_k = {key.shape[-2]} to match key"
        checks.reject(_OP, "value", must, checks.shape(value), RuntimeError)
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
        must = f"be bool, float32 or of query's dtype {dtype}"
        checks.reject(_OP, "attn_mask", must, attn_mask.dtype, RuntimeError)
    if attn_mask.device != device:
        checks.reject(_OP, "attn_mask", f"be on query's device {device}", attn_mask.device, RuntimeError)
    if attn_mask.dim() < 2 and query.dim() == 4:
        checks.reject(_OP, "attn_mask", "have at least 2 dims", checks.shape(attn_mask), IndexError)


def _batch_shape(query, key, value, enable_gqa) -> tuple[int, ...]:
    """The broadcast leading dims (N..., H)."""
    shapes = [t.shape[:-2] for t in (query, key, value)]
    heads = ()
    if enable_gqa:
        for arg, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() < 3:
                checks.reject(_OP, arg, "have a head dim with enable_gqa", f"shape {checks.shape(t)}", IndexError)
            if t.shape[-3] == 0 or query.shape[-3] % t.shape[-3] != 0:
                must = f"have a head count that divides query's {query.shape[-3]} with enable_gqa"
                checks.reject(_OP, arg, must, t.shape[-3], RuntimeError)
        shapes, heads = [s[:-1] for s in shapes], (query.shape[-3],)
    if shapes[0] == shapes[1] == shapes[2]:
        return (*shapes[0], *heads)
    try:
        return (*torch.broadcast_shapes(*shapes), *heads)
    except RuntimeError as error:
        got = ", ".join(str(checks.shape(t)) for t in (query, key, value))
        hint = "" if enable_gqa else " (enable_gqa=True lets heads differ)"
        must = f"have leading dims that broadcast together{hint}"
        raise RuntimeError(f"{_OP}: query, key and value must {must}, got {got}") from error


def _check_mask_shape(attn_mask, target) -> None:
    sizes = zip(reversed(attn_mask.shape), reversed(target), strict=False)
    if attn_mask.dim() > len(target) or any(size not in (1, whole) for size, whole in sizes):
        letters = "(..., S_q, S_k)" if len(target) < 4 else "(..., H, S_q, S_k)"
        checks.reject(_OP, "attn_mask", f"broadcast to {letters} = {target}", checks.shape(attn_mask), RuntimeError)


def _check_kernel_limits(query, value) -> None:
    if query.dtype not in checks.FLOAT_DTYPES:
        checks.reject(_OP, "query", f"be float16, bfloat16 or float32 on {query.device}", query.dtype, TypeError)
    for arg, t in (("query", query), ("value", value)):
        if not 1 <= t.shape[-1] <= checks.MAX_HEAD_DIM:
            must = f"have a head dim between 1 and {checks.MAX_HEAD_DIM} on {query.device}"
            checks.reject(_OP, arg, must, t.shape[-1])


# --------------------------------------------------------------------------------------------------------------------
# From torch's conventions to the operator's.


def _is_causal_bias(attn_mask) -> bool:
    if attn_mask is None or type(attn_mask) is Tensor:
        return False
    # Imported here because that module imports torch._dynamo, which would add a second to every `import fastattn`.
    from torch.nn.attention.bias import CausalBias

    return isinstance(attn_mask, CausalBias)


def _window_right(causal_bias, seqlen_q: int, seqlen_k: int) -> int:
    from torch.nn.attention.bias import CausalVariant

    if causal_bias.variant == CausalVariant.UPPER_LEFT:
        return seqlen_q - seqlen_k
    size = (causal_bias.seq_len_q, causal_bias.seq_len_kv)
    if size != (seqlen_q, seqlen_k):
        must = f"be a causal_lower_right of (S_q, S_k) = {(seqlen_q, seqlen_k)}"
        checks.reject(_OP, "attn_mask", must, size, RuntimeError)
    return 0


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What torch's autocast rule for this op does: every tensor to the region's dtype, float64 excepted."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking about meta raises
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in checks.FLOAT_DTYPES else t for t in tensors)


def _fold(t: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """(N..., H, S, D) or what broadcasts to it, as (B, H, S, D) with B = ∏ N."""
    if t.dim() == 4 and t.shape[:2] == (*lead, heads):
        return t
    return t.expand(*lead, heads, *t.shape[-2:]).reshape(math.prod(lead), heads, *t.shape[-2:])


def _unfold(out: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    """(B, H, S, D) as (N..., H, S, D)."""
    return out if len(batch_shape) == 2 else out.reshape(*batch_shape, *out.shape[-2:])


def _fold_mask(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A mask broadcastable to (N..., H, S_q, S_k) as one broadcastable to (B, H, S_q, S_k), of 2 or 4 dims."""
    if attn_mask.dim() == 2 or (attn_mask.dim() == 4 and len(lead) == 1):
        return attn_mask
    attn_mask = attn_mask.reshape((1,) * (len(lead) + 3 - attn_mask.dim()) + tuple(attn_mask.shape))
    *mask_lead, heads, rows, columns = attn_mask.shape
    if all(size == 1 for size in mask_lead):
        return attn_mask.reshape(1, heads, rows, columns)
    return attn_mask.expand(*lead, heads, rows, columns).reshape(math.prod(lead), heads, rows, columns)


def _torch_computes(query, key, value, attn_mask, dropout_p, lower_right: bool) -> bool:
    """Whether a CPU call goes to torch: where its flash kernel does this job, and for what our code does not take."""
    if query.dtype == torch.float64 or 0 in (query.numel(), key.numel(), value.numel()):
        return True
    return (
        not lower_right
        and dropout_p == 0.0
        and query.shape[-1] == value.shape[-1]
        and not (attn_mask is not None and attn_mask.requires_grad)
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )
