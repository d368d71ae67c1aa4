"""Liger-Kernel's names on fastattn's row ops: signatures, values and gradients against plain torch, modules, refusals."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastattn.integrations import liger
from fastattn.testing.budget import check_budget

OUTPUTS = "return_z_loss return_token_accuracy return_predicted_tokens"
SIGNATURES = {  # of liger-kernel 0.8.5
    "liger_rms_norm": "X W eps offset casting_mode in_place",
    "liger_fused_add_rms_norm": "X R W eps offset casting_mode in_place",
    "liger_layer_norm": "X W B eps",
    "liger_swiglu": "a b",
    "liger_geglu": "a b",
    "liger_softmax": "x",
    "liger_rope": "q k cos sin position_ids unsqueeze_dim rotary_dim",
    "liger_rotary_pos_emb": "q k cos sin position_ids unsqueeze_dim rotary_dim",
    "liger_cross_entropy": f"input target weight size_average ignore_index reduce reduction label_smoothing lse_square_scale softcap {OUTPUTS}",
    "liger_fused_linear_cross_entropy": "input weight target bias ce_weight ignore_index lse_square_scale label_smoothing reduction softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy return_predicted_tokens chunk_mem_const",
    "LigerRMSNorm": "hidden_size eps offset casting_mode init_fn in_place row_mode elementwise_affine",
    "LigerLayerNorm": "hidden_size eps bias init_fn impl mode backend",
    "LigerSwiGLUMLP": "config intermediate_size",
    "LigerGEGLUMLP": "config",
    "LigerCrossEntropyLoss": f"weight ignore_index lse_square_scale label_smoothing reduction softcap {OUTPUTS}",
    "LigerFusedLinearCrossEntropyLoss": "ce_weight ignore_index lse_square_scale label_smoothing reduction softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy return_predicted_tokens",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(liger, name)).parameters) == SIGNATURES[name].split()


def rms(x, w, offset, llama):
    y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6 if x.dtype != torch.float64 else x.square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)
    return y * (w + offset)


def rope(q, k, cos, sin):
    """transformers' apply_rotary_pos_emb."""
    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None].to(x.dtype) + torch.cat([-second, first], -1) * sin[:, None].to(x.dtype)

    return torch.cat([turn(q).flatten(), turn(k).flatten()])


ANGLES = torch.cat([torch.arange(5)[None, :, None] / 10.0 ** torch.arange(4)] * 2, -1)  # (1, S, R), each twice
CASES = {
    "rms": (lambda x, w: liger.liger_rms_norm(x, w, 1e-6), lambda x, w: rms(x, w, 0.0, True), [(3, 20), (20,)]),
    "rms-gemma": (lambda x, w: liger.liger_rms_norm(x, w, 1e-6, 1.0, "gemma", False), lambda x, w: rms(x, w, 1.0, False), [(3, 20), (20,)]),
    "add-rms": (lambda x, r, w: torch.stack(liger.liger_fused_add_rms_norm(x, r, w, 1e-6)), lambda x, r, w: torch.stack([rms(x + r, w, 0.0, True), x + r]), [(3, 20), (3, 20), (20,)]),
    "layer": (lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, (20,), w, b, 1e-5), [(3, 20), (20,), (20,)]),
    "swiglu": (liger.liger_swiglu, lambda a, b: F.silu(a) * b, [(3, 20), (3, 20)]),
    "geglu": (liger.liger_geglu, lambda a, b: F.gelu(a, approximate="tanh") * b, [(3, 20), (3, 20)]),
    "softmax": (liger.liger_softmax, lambda x: torch.softmax(x, -1), [(3, 20)]),
    "rope": (lambda q, k: torch.cat([t.flatten() for t in liger.liger_rope(q, k, ANGLES.cos(), ANGLES.sin())]), lambda q, k: rope(q, k, ANGLES.cos(), ANGLES.sin()), [(2, 4, 5, 8), (2, 2, 5, 8)]),
}  # fmt: skip


@pytest.mark.both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    function, naive, shapes = CASES[case]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    results = []
    for call, of in ((function, dtype), (naive, dtype), (naive, torch.float64)):
        inputs = [t.clone().to(of).requires_grad_() for t in tensors]
        out = call(*inputs)
        torch.manual_seed(1)
        dout = torch.randn(out.shape).to(dtype)
        kept = dout.clone()
        results.append((out, *torch.autograd.grad(out, inputs, dout.to(of))))
        assert torch.equal(dout, kept)
    for i, (out, in_dtype, ref64) in enumerate(zip(*results)):
        check_budget(f"liger {case} {i}", out, in_dtype, ref64)


def test_rope_by_tables_of_half_the_width_and_of_part_of_a_head():
    q, k = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 5, 12)
    cos, sin = ANGLES.cos(), ANGLES.sin()
    whole = liger.liger_rope(q, k, cos, sin)
    half = liger.LigerRopeFunction.apply(q, k, cos[..., :4], sin[..., :4], None, 1, 8)
    for x, a, b in zip((q, k), whole, half):
        assert torch.equal(a, b) and torch.equal(a[..., 8:], x[..., 8:]) and not torch.equal(a[..., :8], x[..., :8])
    assert torch.equal(liger.liger_rope(q, k, cos[0], sin[0])[0], whole[0])
    with pytest.raises(NotImplementedError, match="liger_rope: unsqueeze_dim is not supported, got 2"):
        liger.liger_rope(q, k, cos, sin, unsqueeze_dim=2)


def test_functions_are_called_by_apply():
    x, w = torch.randn(3, 20), torch.randn(20)
    assert torch.equal(liger.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", True, None), liger.liger_rms_norm(x, w, 1e-6))
    assert torch.equal(liger.LigerSiLUMulFunction.apply(x, x), liger.liger_swiglu(x, x))


LOSSES = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "softcap": 3.0},
    {"lse_square_scale": 0.01, "return_z_loss": True},
    {"lse_square_scale": 0.01, "return_z_loss": True, "reduction": "none"},
]


def expected_loss(logits, target, reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None, **_):
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    each = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    z = (lse_square_scale * logits.logsumexp(-1).square()).masked_fill(target == -100, 0)
    return [{"mean": part.sum() / (target != -100).sum(), "sum": part.sum(), "none": part}[reduction] for part in (each + z, z)]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses(options):
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((6, 8), (30, 8), (30,)))
    target = torch.tensor([3, -100, 0, 29, 7, 7])
    loss, z = expected_loss(hidden @ weight.T + bias, target, **options)
    wanted = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    found = {
        "function": lambda: liger.liger_cross_entropy(hidden @ weight.T + bias, target, **options),
        "module": lambda: liger.LigerCrossEntropyLoss(**options)(hidden @ weight.T + bias, target),
        "fused": lambda: liger.liger_fused_linear_cross_entropy(hidden, weight, target, bias, **options),
        "fused module": lambda: liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, target, bias),
    }
    for name, call in found.items():
        result = call()
        if options.get("return_z_loss"):
            assert result.token_accuracy is result.predicted_tokens is None
            torch.testing.assert_close(result.z_loss, z)
            result = result.loss
        torch.testing.assert_close(result, loss, msg=name)
        for grad, want in zip(torch.autograd.grad(result.sum(), (hidden, weight, bias)), wanted):
            torch.testing.assert_close(grad, want)


def test_class_weights():
    logits, target, weight = torch.randn(6, 30), torch.tensor([3, -100, 0, 29, 7, 7]), torch.rand(30)
    torch.testing.assert_close(liger.LigerCrossEntropyLoss(weight)(logits, target), F.cross_entropy(logits, target, weight))
    with pytest.raises(NotImplementedError, match="class weights together with lse_square_scale"):
        liger.liger_cross_entropy(logits, target, weight, lse_square_scale=0.1)


def test_modules():
    x = torch.randn(2, 3, 16)
    assert {n: tuple(p.shape) for n, p in liger.LigerRMSNorm(16).named_parameters()} == {"weight": (16,)}
    torch.testing.assert_close(liger.LigerRMSNorm(16, init_fn="zeros", offset=1.0, casting_mode="gemma")(x), F.rms_norm(x, (16,), None, 1e-6))
    torch.testing.assert_close(liger.LigerRMSNorm(16, elementwise_affine=False)(x), F.rms_norm(x, (16,), None, 1e-6))
    half = liger.LigerRMSNorm(16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    norm = liger.LigerLayerNorm(16, eps=1e-5, bias=True)
    assert norm.bias.abs().sum() > 0 and liger.LigerLayerNorm(16).bias.abs().sum() == 0
    torch.testing.assert_close(norm(x), F.layer_norm(x, (16,), norm.weight, norm.bias, 1e-5))
    config = SimpleNamespace(hidden_size=16, intermediate_size=24, hidden_act="silu")
    for mlp, activation in ((liger.LigerSwiGLUMLP(config), F.silu), (liger.LigerGEGLUMLP(config), lambda g: F.gelu(g, approximate="tanh"))):
        assert set(mlp.state_dict()) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
        torch.testing.assert_close(mlp(x), mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert liger.LigerSwiGLUMLP(config, intermediate_size=8).gate_proj.out_features == 8
    assert torch.equal(liger.LigerSoftmax()(x), liger.liger_softmax(x))


REFUSED = {
    "return_token_accuracy": lambda: liger.LigerCrossEntropyLoss(return_token_accuracy=True),
    "return_predicted_tokens": lambda: liger.liger_cross_entropy(torch.ones(1, 2), torch.zeros(1).long(), return_predicted_tokens=True),
    "use_token_scaling": lambda: liger.LigerFusedLinearCrossEntropyLoss(use_token_scaling=True),
    "impl": lambda: liger.LigerLayerNorm(8, impl="triton"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_there_is_refused_by_name(option):
    with pytest.raises(NotImplementedError, match=f"{option} is not supported, got"):
        REFUSED[option]()


def test_errors():
    with pytest.raises(ValueError, match="liger_rms_norm: casting_mode must be one of llama, gemma, none, got 'half'"):
        liger.liger_rms_norm(torch.ones(2), None, 1e-6, casting_mode="half")
    with pytest.raises(ValueError, match="LigerRMSNorm: init_fn must be 'ones' or 'zeros'"):
        liger.LigerRMSNorm(8, init_fn="normal")
    with pytest.raises(ValueError, match="config.hidden_act must be 'silu' or 'swish', got 'gelu'"):
        liger.LigerSwiGLUMLP(SimpleNamespace(hidden_size=4, intermediate_size=4, hidden_act="gelu"))
