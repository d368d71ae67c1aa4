"""Cases of `fastattn.attention` and the one check that judges them: shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

import dataclasses

import torch

import fastattn
from fastattn.ops.attention import dropout_keep
from fastattn.reference import attention as reference
from fastattn.testing.budget import check_budget

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `attention`; `bias` is the shape of a float attn_bias, `mask` of a bool one."""

    B: int = 1
    S_q: int = 100
    S_k: int = 130
    H: int = 2
    H_kv: int = 2
    D: int = 64
    D_v: int = 64
    dtype: torch.dtype = F16
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    slopes: bool = False
    sinks: bool = False
    lse_grad: bool = True
    options: dict = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Inputs in the test's dtype that get a gradient."""
        tensors = dict(
            q=torch.randn(self.B, self.S_q, self.H, self.D),
            k=torch.randn(self.B, self.S_k, self.H_kv, self.D),
            v=torch.randn(self.B, self.S_k, self.H_kv, self.D_v),
        )
        if self.bias is not None:
            tensors["attn_bias"] = torch.randn(self.bias)
        if self.sinks:
            tensors["sinks"] = torch.randn(self.H)
        return {name: t.to(self.dtype) for name, t in tensors.items()}

    def constants(self) -> dict[str, torch.Tensor]:
        constants = {}
        if self.mask is not None:
            constants["attn_bias"] = torch.rand(self.mask) > 0.3
        if self.slopes:
            constants["alibi_slopes"] = torch.rand(self.H)
        return constants

    def __str__(self) -> str:
        shape = f"B{self.B}-S{self.S_q}x{self.S_k}-H{self.H}x{self.H_kv}-D{self.D}x{self.D_v}-{str(self.dtype)[6:]}"
        extras = [f"bias{self.bias}" if self.bias else "", f"mask{self.mask}" if self.mask else ""]
        extras += ["alibi" if self.slopes else "", "sinks" if self.sinks else ""]
        extras += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([shape, *filter(None, extras)]).replace(" ", "")


def run(function, tensors, constants, dtype, dout, dlse, **options) -> dict[str, torch.Tensor]:
    """out, lse and the gradient of every tensor, in `dtype`; dlse None leaves the LSE out of the loss."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    named = {name: t for name, t in leaves.items() if name not in ("q", "k", "v")}
    out, lse = function(leaves["q"], leaves["k"], leaves["v"], **named, **constants, **options, return_lse=True)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + torch.where(lse.isfinite(), lse, 0.0).mul(dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(out=out, lse=lse, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})


def check(case: Case, device: str = "cpu") -> None:
    """fastattn.attention against the float64 reference, within the budget that the reference in the same dtype sets."""
    options = dict(case.options)
    tensors, constants = ({n: t.to(device) for n, t in d.items()} for d in (case.tensors(), case.constants()))
    dout = torch.randn(case.B, case.S_q, case.H, case.D_v).to(device, case.dtype)  # the same for truth and naive
    dlse = torch.randn(case.B, case.H, case.S_q).to(device) if case.lse_grad else None
    oracle_options = dict(options)
    if options.get("dropout_p"):
        torch.manual_seed(7)
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
        oracle_options["dropout_keep"] = dropout_keep(
            seed, case.B, case.H, case.S_q, case.S_k, options["dropout_p"]
        )
        torch.manual_seed(7)
    got = run(fastattn.attention, tensors, constants, case.dtype, dout, dlse, **options)
    truth = run(reference, tensors, constants, torch.float64, dout, dlse, **oracle_options)
    naive = run(reference, tensors, constants, case.dtype, dout, dlse, **oracle_options)
    for name in got:
        check_budget(f"attention {case} {name}", got[name], naive[name], truth[name])


# Regimes: tile-aligned and ragged, S_q below, equal to and above S_k, groups, head dims below, at and between powers of two, D_v ≠ D.
VALUES = [
    *(Case(2, 128, 128, 2, 2, dtype=dtype) for dtype in (F16, BF16, F32)),
    *(Case(1, 140, 200, 4, 2, dtype=dtype, options=dict(causal=True)) for dtype in (F16, BF16, F32)),
    Case(1, 200, 70, D=32, D_v=48, options=dict(causal=True)),
    Case(1, 300, 300, 2, 1, D=16, D_v=16, dtype=BF16, options=dict(causal=True)),
    Case(1, 40, 50, 1, 1, D=96, D_v=80, options=dict(causal=True)),
    Case(1, 40, 50, 2, 1, D=256, D_v=160, dtype=BF16, options=dict(causal=True)),
    Case(1, 40, 50, 1, 1, D=300, D_v=512, options=dict(causal=True)),
    Case(1, 5, 7, 1, 1, D=1, D_v=1, dtype=F32),
    Case(1, 33, 65, 1, 1, D=7, D_v=3, dtype=BF16, options=dict(causal=True)),
]
FEATURES = [
    Case(options=dict(window=(20, 5))),
    Case(S_q=300, S_k=300, H_kv=1, options=dict(window=(140, 0), causal=True)),
    Case(S_q=300, S_k=280, D=40, D_v=24, options=dict(window=(None, 100))),
    Case(S_q=280, S_k=300, dtype=BF16, options=dict(window=(100, -1))),
    Case(options=dict(window=(0, 0))),
    Case(options=dict(softcap=5.0, causal=True)),
    Case(dtype=F32, options=dict(softcap=0.5)),
    Case(dtype=F32, options=dict(softcap=1e4)),
    Case(slopes=True, options=dict(causal=True)),
    Case(B=2, slopes=True, dtype=BF16),
    Case(B=2, bias=(2, 2, 100, 130)),
    Case(B=2, bias=(1, 1, 100, 130), options=dict(causal=True)),
    Case(B=2, H=4, bias=(2, 1, 1, 130)),
    Case(B=2, H=4, bias=(4, 100, 1)),
    Case(B=2, bias=(1,)),
    Case(B=2, bias=(130,), dtype=BF16, options=dict(window=(64, 10))),
    Case(B=2, mask=(2, 1, 100, 130)),
    Case(mask=(100, 130), options=dict(causal=True)),
    Case(sinks=True, S_k=30, options=dict(causal=True)),
    Case(sinks=True, H=4, dtype=BF16, options=dict(window=(16, 0))),
    Case(options=dict(dropout_p=0.3)),
    Case(S_q=150, dtype=BF16, options=dict(dropout_p=0.1, causal=True)),
    Case(H=4, D=40, D_v=24, dtype=BF16, bias=(1, 4, 100, 130), slopes=True, sinks=True,
         options=dict(dropout_p=0.3, softcap=4.0, window=(60, 30))),
    Case(S_q=40, options=dict(causal=True, softmax_scale=-0.2)),
    Case(S_q=40, options=dict(causal=True, softmax_scale=0.0)),
    Case(S_q=40, options=dict(causal=True, softmax_scale=3.0)),
    Case(S_q=40, options=dict(causal=True, softmax_scale=1e-50)),
]  # fmt: skip
