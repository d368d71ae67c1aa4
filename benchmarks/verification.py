"""Is an op right on this device? Measured against the naive reference in float64, judged by the project's one error budget.

Attention has a grid of its options here; what other ops are held to are their benchmarks' smallest shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention import attend, draw_seed, dropout_keep
from fastattn.testing.budget import ABSOLUTE_SLACK, BASELINE_FACTOR

TENSORS = ("out", "dq", "dk", "dv", "dsinks")
BLOCK_SCORES = 1 << 24  # entries of the largest piece of an S × S matrix that the reference holds while it checks
CHECKED_AT_ONCE = 1 << 26  # elements: float64 copies of all of a large weight's gradient would fill a GPU


@dataclass(frozen=True)
class Check:
    """One tensor's error beside what it is allowed."""

    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a share of the budget."""
        return self.error / self.budget


def check(out: Tensor, naive: Tensor, ref64: Tensor) -> Check:
    """The error budget of `fastattn.testing.budget`, as figures, computed where the tensors are. Non-finite is an infinite error,
    except where the reference is the same."""
    error, naive_error, scale = 0.0, 0.0, 1.0
    for o, n, r in zip(*(t.flatten().split(CHECKED_AT_ONCE) for t in (out, naive, ref64)), strict=True):
        o, n, finite = o.double(), n.double(), r.isfinite()
        error = max(error, _max((o - r).abs().masked_fill(o == r, 0.0).nan_to_num(math.inf, math.inf)))
        naive_error = max(naive_error, _max((n - r).abs().masked_fill(~finite | ~n.isfinite(), 0.0)))
        scale = max(scale, _max(r.abs().masked_fill(~finite, 0.0)))
    return Check(error, BASELINE_FACTOR * naive_error + ABSOLUTE_SLACK * scale)


def _max(t: Tensor) -> float:
    return t.max().item() if t.numel() else 0.0


def relative_error(out: Tensor, ref64: Tensor) -> float:
    """‖out − ref64‖ / ‖ref64‖; the check that a peer's wiring gets."""
    return ((out.double() - ref64).norm() / ref64.norm()).item()


def reference_results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, dtype: torch.dtype, *, window_left: int | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, dropout_p: float = 0.0, keep: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """out, dq, dk, dv, and dsinks where there are sinks, of the naive reference in `dtype`, for S_q = S_k, without ever holding a whole
    S × S matrix of scores.

    One key/value head at a time, and blocks of rows: rows [a, b) with keys [0, b) are again a bottom-right causal problem, and a window
    (which needs causal) lies in it as in the whole. dk, dv and dsinks sum their blocks in at least float32, as one matrix product over all
    rows would. keep: dropout's mask (B, H, S, S).
    """
    batch, seqlen, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    group_size = num_heads // num_kv_heads
    accumulate = torch.promote_types(dtype, torch.float32)
    out, dq = (torch.empty_like(t, dtype=dtype) for t in (dout, q))
    dk, dv = (torch.zeros_like(t, dtype=accumulate) for t in (k, v))
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=accumulate)
    rows = max(64, BLOCK_SCORES // (seqlen * group_size))
    for b in range(batch):
        for kv_head in range(num_kv_heads):
            heads, kv = slice(kv_head * group_size, (kv_head + 1) * group_size), slice(kv_head, kv_head + 1)
            for start in range(0, seqlen, rows):
                stop = min(start + rows, seqlen)
                keys = stop if causal else seqlen
                inputs = {"q": q[b : b + 1, start:stop, heads], "k": k[b : b + 1, :keys, kv], "v": v[b : b + 1, :keys, kv]}
                inputs |= {} if sinks is None else {"sinks": sinks[heads]}
                inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
                block = fastattn.reference.attention(
                    **inputs, causal=causal, window=(window_left, None), softcap=softcap, dropout_p=dropout_p,
                    dropout_keep=None if keep is None else keep[b : b + 1, heads, start:stop, :keys],
                )  # fmt: skip
                upstream = dout[b : b + 1, start:stop, heads].to(dtype)
                dq_block, dk_block, dv_block, *dsinks_block = torch.autograd.grad(block, list(inputs.values()), upstream)
                out[b, start:stop, heads] = block.detach()[0]
                dq[b, start:stop, heads] = dq_block[0]
                dk[b, :keys, kv] += dk_block[0]
                dv[b, :keys, kv] += dv_block[0]
                if dsinks is not None:
                    dsinks[heads] += dsinks_block[0]
    return [out, dq, dk.to(dtype), dv.to(dtype), *([] if dsinks is None else [dsinks.to(dtype)])]


# --------------------------------------------------------------------------------------------------------------------
# Attention's grid of options behind `fastattn verify`.


@dataclass(frozen=True)
class Case:
    """One call: shapes (small: the reference holds S × S), and the options by name."""

    name: str
    batch: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 113
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    head_dim_v: int = 64
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi: bool = False
    bias: str = ""  # "", "bool" or "float"
    sinks: bool = False
    dropout_p: float = 0.0
    lengths: tuple[tuple[int, int], ...] = ()  # packed: (S_q, S_k) of each sequence


CASES = (
    Case("plain"),
    Case("causal", causal=True),
    Case("causal, longer than a block", seqlen_q=300, seqlen_k=300, causal=True),
    Case("causal, S_q < S_k", seqlen_q=37, causal=True),
    Case("causal, S_q > S_k (empty rows)", seqlen_k=41, causal=True),
    Case("one query", seqlen_q=1, seqlen_k=200, causal=True),
    Case("head_dim 128", head_dim=128, head_dim_v=128, causal=True),
    Case("head_dim 80", head_dim=80, head_dim_v=80),
    Case("head_dim 72, d_v 40", head_dim=72, head_dim_v=40, causal=True),
    Case("head_dim 256", batch=1, num_heads=2, num_kv_heads=1, head_dim=256, head_dim_v=256, causal=True),
    Case("GQA 4 to 1", num_kv_heads=1, causal=True),
    Case("window left", window=(31, 0)),
    Case("window both sides", window=(17, 40)),
    Case("softcap", softcap=15.0, causal=True),
    Case("ALiBi", alibi=True, causal=True),
    Case("bool bias", bias="bool"),
    Case("float bias", bias="float", causal=True),
    Case("sinks", sinks=True, causal=True),
    Case("dropout", dropout_p=0.2, causal=True),
    Case("varlen", lengths=((64, 64), (0, 17), (33, 129), (1, 1)), causal=True),
    Case("varlen, GQA, window, sinks", lengths=((90, 90), (5, 140)), num_kv_heads=2, window=(50, 0), sinks=True),
    Case("everything", num_kv_heads=2, causal=True, window=(60, 0), softcap=20.0, alibi=True, bias="float", sinks=True, dropout_p=0.1),
)  # fmt: skip


def verify_case(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Check]:
    """Output, LSE and every gradient of one case against the reference."""
    inputs, options = _draw(case, dtype, device, seed)
    out, lse = _run_op(case, inputs, options)
    douts = [_randn(t.shape, t.dtype, device, seed + 1 + i) for i, t in enumerate((out, lse))]
    douts[1].masked_fill_(~lse.isfinite(), 0.0)
    ours = [out, lse, *torch.autograd.grad([out, lse], list(inputs.values()), douts)]
    naive, ref64 = (_run_reference(case, inputs, options, douts, wanted) for wanted in (dtype, torch.float64))
    names = ["out", "lse", *(f"d{name}" for name in inputs)]
    return {name: check(*tensors) for name, *tensors in zip(names, ours, naive, ref64)}


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The differentiable inputs, and the options, of a case."""
    heads, lengths = case.num_heads, case.lengths or ((case.seqlen_q, case.seqlen_k),) * case.batch
    if case.lengths:
        lead_q, lead_k = (sum(q for q, _ in lengths),), (sum(k for _, k in lengths),)
    else:
        lead_q, lead_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    max_q, max_k = max(q for q, _ in lengths), max(k for _, k in lengths)
    shapes = {
        "q": (*lead_q, heads, case.head_dim),
        "k": (*lead_k, case.num_kv_heads, case.head_dim),
        "v": (*lead_k, case.num_kv_heads, case.head_dim_v),
    }
    if case.bias == "float":
        shapes["attn_bias"] = (1, heads, max_q, max_k)
    if case.sinks:
        shapes["sinks"] = (heads,)
    inputs = {
        name: _randn(s, dtype, device, seed + 10 * i).requires_grad_() for i, (name, s) in enumerate(shapes.items())
    }
    options: dict[str, Any] = {}
    if case.bias == "bool":
        options["attn_bias"] = _randn((len(lengths), 1, max_q, max_k), torch.float32, device, seed + 99) > -0.5
    if case.alibi:
        options["alibi_slopes"] = torch.tensor([2.0 ** -(h + 1) for h in range(heads)], device=device)
    if case.lengths:
        for name, position in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            ends = torch.tensor([0, *(pair[position] for pair in lengths)]).cumsum(0)
            options[name] = ends.to(device, torch.int32)
    if case.dropout_p:
        options["dropout_seed"] = draw_seed(device)
    return inputs, options


def _run_op(case: Case, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if not case.dropout_p:
        named = {name: t for name, t in inputs.items() if name not in "qkv"}
        return fastattn.attention(
            *(inputs[name] for name in "qkv"), **named, **options,
            causal=case.causal, window=case.window, softcap=case.softcap, return_lse=True,
        )  # fmt: skip
    left, right = case.window  # the public function draws its own seed: a known one goes in below it
    return attend(
        **inputs, **options, softcap=case.softcap, dropout_p=case.dropout_p,
        window_left=left, window_right=0 if case.causal else right,
    )  # fmt: skip


def _run_reference(case, inputs, options, douts, dtype) -> list[Tensor]:
    options = dict(options)
    seed = options.pop("dropout_seed", None)
    if seed is not None:
        shape = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)
        options |= {"dropout_p": case.dropout_p, "dropout_keep": dropout_keep(seed, *shape, case.dropout_p)}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    out, lse = fastattn.reference.attention(
        **leaves, **options, causal=case.causal, window=case.window, softcap=case.softcap, return_lse=True
    )
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [d.to(t.dtype) for d, t in zip(douts, (out, lse))])
    return [t.detach() for t in (out, lse, *grads)]
