"""Gated linear units, forward and backward.

    out = act(gate) ∘ up        dup = dout ∘ act(gate)        dgate = dout ∘ up ∘ act′(gate)

in fp32, with act one of

    "silu"        g·σ(g)
    "gelu_tanh"   g·σ(2z), z = √(2/π)·(g + 0.044715·g³), which is g·(1 + tanh z)/2
    "gelu"        g·Φ(g), Φ the normal distribution's integral

Nothing is reduced, so a program takes any block of a row, and tensors that are contiguous are one row, whatever their shapes.
Gate and up as halves of one projection's output, rows 2·N apart, are read as they lie. Floor: 3·numel·itemsize bytes forward,
5·numel·itemsize backward.
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import LOG2E, cast, reciprocal
from .row_tiles import LONG, RowConfig, pick_row_config
from .rows import Rows, body, edge, row_start

log = logging.getLogger("fastattn")

TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


# --------------------------------------------------------------------------------------------------------------------
# Activations. Everything goes through e = exp(−|·|) ≤ 1: no overflow to inf, so no inf·0, and small tails keep their digits.


@triton.jit
def logistic(x):
    """(σ(x), σ′(x)) with σ(x) = 1/(1 + exp(−x)) and σ′ = σ(x)·σ(−x)."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    r = reciprocal(1.0 + e)
    return tl.where(x >= 0.0, r, e * r), e * r * r


@triton.jit
def normal(x):
    """(Φ(x), φ(x)) of the standard normal distribution.

    Φ(−|x|) = exp(−x²/2)·P(t) with t = 1/(1 + 0.4·|x|) and P a polynomial fitted to it: to 3e-8, and 0.2 % where Φ itself is
    tiny and 1 + erf(x/√2) has lost all its digits. A third of erf's instructions, and its exponential is φ's as well.
    """
    e = tl.exp2(x * x * (-0.5 * LOG2E))
    t = reciprocal(1.0 + 0.4 * tl.abs(x))
    p = ((((0.054971604 * t - 0.249054028) * t + 0.330811066) * t + 0.0201273462) * t + 0.186030954) * t + 0.157113083
    tail = e * (p * t)
    return tl.where(x >= 0.0, 1.0 - tail, tail), e * INV_SQRT_2PI


@triton.jit
def activation(g, ACTIVATION: tl.constexpr):
    """act(g) and act′(g)."""
    if ACTIVATION == "silu":
        s, ds = logistic(g)
        slope = s + g * ds
    elif ACTIVATION == "gelu_tanh":
        bounded = tl.minimum(tl.maximum(g, -16.0), 16.0)  # beyond, σ is 0 or 1 and σ′ 0, which g² = inf must not multiply
        square = bounded * bounded
        s, ds = logistic(bounded * (square * (TWO_SQRT_2_OVER_PI * CUBIC) + TWO_SQRT_2_OVER_PI))
        slope = s + g * (ds * (square * (3.0 * TWO_SQRT_2_OVER_PI * CUBIC) + TWO_SQRT_2_OVER_PI))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        s, ds = normal(g)
        slope = s + g * ds
    return g * s, slope


# --------------------------------------------------------------------------------------------------------------------
# Kernels.


@triton.jit
def block_of_rows(num_rows, num_blocks, ROWS: tl.constexpr):
    """(row, in_rows, block): the (ROWS,) rows of this program, which of them there are, and which block of their columns."""
    program = tl.program_id(0)
    row = program // num_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    return tl.where(in_rows, row, 0), in_rows, program % num_blocks


@triton.jit
def columns(start, block, num_cols, in_rows, ACCESS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets, mask), (ROWS, BLOCK): this block's columns of the bodies of rows at `start`."""
    first, length = body(start, num_cols, ACCESS)
    at = block.to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)[None, :]
    left = tl.minimum(length - at, BLOCK).to(tl.int32)
    return (first + at)[:, None] + cols, (cols < left[:, None]) & in_rows[:, None]


@triton.jit
def forward(gate_ptr, up_ptr, out_ptr, mask, ACTIVATION: tl.constexpr):
    """out = act(gate)∘up of one tile of pointers."""
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    y, _ = activation(gate, ACTIVATION)
    tl.store(out_ptr, cast(y * up, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, mask, ACTIVATION: tl.constexpr):
    """dup = dout∘act(gate) and dgate = dout∘(up∘act′(gate)) of one tile of pointers: up·act′ first, as that is never larger than
    up by more than an eighth, where dout·up may be inf and act′ 0."""
    dout = tl.load(dout_ptr, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    y, slope = activation(gate, ACTIVATION)
    tl.store(dgate_ptr, cast(dout * (up * slope), dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr, cast(dout * y, dup_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_edges(gate_ptr, up_ptr, out_ptr, gate, up, out, num_cols, in_rows, ACTIVATION: tl.constexpr):
    """`forward` of the columns outside the bodies of rows at `gate`, `up` and `out`."""
    at_gate, mask = edge(gate, num_cols, in_rows)
    at_up, _ = edge(up, num_cols, in_rows)
    at_out, _ = edge(out, num_cols, in_rows)
    forward(gate_ptr + at_gate, up_ptr + at_up, out_ptr + at_out, mask, ACTIVATION)


@triton.jit
def backward_edges(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dout, gate, up, dgate, dup, num_cols, in_rows, ACTIVATION: tl.constexpr
):
    """`backward` of the columns outside the bodies."""
    at_dout, mask = edge(dout, num_cols, in_rows)
    at_gate, _ = edge(gate, num_cols, in_rows)
    at_up, _ = edge(up, num_cols, in_rows)
    at_dgate, _ = edge(dgate, num_cols, in_rows)
    at_dup, _ = edge(dup, num_cols, in_rows)
    backward(dout_ptr + at_dout, gate_ptr + at_gate, up_ptr + at_up, dgate_ptr + at_dgate, dup_ptr + at_dup, mask, ACTIVATION)


SIZES = ["num_rows", "inner", "num_cols", "num_blocks"]
STRIDES = [
    "stride_douto", "stride_douti", "stride_gateo", "stride_gatei", "stride_upo", "stride_upi", "stride_outo", "stride_outi",
    "stride_dgateo", "stride_dgatei", "stride_dupo", "stride_dupi",
]  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[2:8]])
def _glu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, num_rows, inner, num_cols, num_blocks, stride_gateo, stride_gatei, stride_upo, stride_upi,
    stride_outo, stride_outi, ACTIVATION: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = act(gate)∘up of one block of columns of ROWS rows; the first block's program does the rows' edges too."""
    row, in_rows, block = block_of_rows(num_rows, num_blocks, ROWS)
    gate = row_start(row, inner, stride_gateo, stride_gatei)
    up = row_start(row, inner, stride_upo, stride_upi)
    out = row_start(row, inner, stride_outo, stride_outi)
    at_gate, mask = columns(gate, block, num_cols, in_rows, ACCESS, BLOCK)
    at_up, _ = columns(up, block, num_cols, in_rows, ACCESS, BLOCK)
    at_out, _ = columns(out, block, num_cols, in_rows, ACCESS, BLOCK)
    forward(gate_ptr + at_gate, up_ptr + at_up, out_ptr + at_out, mask, ACTIVATION)
    if ACCESS == "edges":
        if block == 0:
            forward_edges(gate_ptr, up_ptr, out_ptr, gate, up, out, num_cols, in_rows, ACTIVATION)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[:6], *STRIDES[8:]])
def _glu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, num_rows, inner, num_cols, num_blocks, stride_douto, stride_douti,
    stride_gateo, stride_gatei, stride_upo, stride_upi, stride_dgateo, stride_dgatei, stride_dupo, stride_dupi,
    ACTIVATION: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dout∘up∘act′(gate) and dup = dout∘act(gate), blocks and edges as in the forward."""
    row, in_rows, block = block_of_rows(num_rows, num_blocks, ROWS)
    dout = row_start(row, inner, stride_douto, stride_douti)
    gate = row_start(row, inner, stride_gateo, stride_gatei)
    up = row_start(row, inner, stride_upo, stride_upi)
    dgate = row_start(row, inner, stride_dgateo, stride_dgatei)
    dup = row_start(row, inner, stride_dupo, stride_dupi)
    at_dout, mask = columns(dout, block, num_cols, in_rows, ACCESS, BLOCK)
    at_gate, _ = columns(gate, block, num_cols, in_rows, ACCESS, BLOCK)
    at_up, _ = columns(up, block, num_cols, in_rows, ACCESS, BLOCK)
    at_dgate, _ = columns(dgate, block, num_cols, in_rows, ACCESS, BLOCK)
    at_dup, _ = columns(dup, block, num_cols, in_rows, ACCESS, BLOCK)
    backward(
        dout_ptr + at_dout, gate_ptr + at_gate, up_ptr + at_up, dgate_ptr + at_dgate, dup_ptr + at_dup, mask, ACTIVATION
    )
    if ACCESS == "edges":
        if block == 0:
            backward_edges(
                dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dout, gate, up, dgate, dup, num_cols, in_rows, ACTIVATION
            )


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


def glu_fwd(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, config: RowConfig | None = None
) -> torch.Tensor:
    """Launch the forward kernel; up has gate's shape, or None says that gate holds [gate; up]. Any strides. Returns out, contiguous."""
    gate, up = halves(gate) if up is None else (gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_glu_fwd_kernel, "glu_fwd", activation, config, dict(gate=gate, up=up), dict(out=out))
    return out


def glu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, config: RowConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernel. Returns (dgate, dup), contiguous; of a packed gate, (dgate, None) with dgate packed alike."""
    packed = up is None
    grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(1 if packed else 2)]
    gate, up = halves(gate) if packed else (gate, up)
    dgate, dup = halves(grads[0]) if packed else grads
    _launch(_glu_bwd_kernel, "glu_bwd", activation, config, dict(dout=dout, gate=gate, up=up), dict(dgate=dgate, dup=dup))
    return grads[0], None if packed else grads[1]


def halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up) in one tensor: views of its last dim's halves."""
    num_cols = packed.shape[-1] // 2
    return packed[..., :num_cols], packed[..., num_cols:]


def _launch(
    kernel, op: str, activation: str, config: RowConfig | None, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> None:
    tensors = inputs | outputs
    if all(t.is_contiguous() for t in tensors.values()):
        rows = Rows(**{name: t.view(-1) for name, t in tensors.items()})
    else:
        rows = Rows(**tensors)
        if any(rows.tensors[name] is not t for name, t in outputs.items()):
            # Rows has copied everything, the inputs' leading dims being no two; contiguous inputs go with any output.
            rows = Rows(**{name: t.contiguous() for name, t in inputs.items()}, **outputs)
    config = config or pick_row_config(op, min(rows.num_cols, LONG), max(t.element_size() for t in tensors.values()))
    log.debug("%s: %s", op, config)
    num_blocks = triton.cdiv(rows.num_cols, config.BLOCK)
    check_grid("glu", rows.num_rows + config.ROWS)  # rows, which the kernel counts in 32 bits
    grid = check_grid("glu", triton.cdiv(rows.num_rows, config.ROWS) * num_blocks)
    launch(kernel, grid, rows.device, **rows.args(), num_blocks=num_blocks, ACTIVATION=activation, **config.meta())
