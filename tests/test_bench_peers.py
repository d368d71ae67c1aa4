"""The adapters of peers that are not installed, over stand-ins with those peers' signatures: what they pass on is the problem asked for."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.benchmarks import attention_peers, suite
from fastattn.benchmarks.bench_attention import Shape

CPU = torch.device("cpu")
PLAIN = Shape(2, 24, 4, 2, 16, True)
CASES = {
    "causal": PLAIN,
    "full": Shape(2, 24, 4, 2, 16, False),
    "window": Shape(2, 24, 4, 2, 16, True, window=5),
    "varlen": Shape(3, 11, 4, 2, 16, True, lengths=(11, 1, 7)),
    "softcap": Shape(2, 24, 4, 2, 16, True, softcap=3.0),
    "dropout": Shape(2, 24, 4, 2, 16, True, dropout_p=0.1),
    "sinks": Shape(2, 24, 4, 2, 16, True, sinks=True),
}


def install(monkeypatch, module, **names):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**names))


def verdict(op, shape, name, builder):
    """What `bench` would make of this peer: "fwd", "fwd+bwd", or the reason it is left out."""
    found = suite.suite_of(op)
    inputs, upstream = found.draw(shape, torch.float32, CPU)
    try:
        _, differentiable = suite.checked_forward(found, shape, name, builder, inputs, upstream)
    except (NotImplementedError, ArithmeticError) as error:
        return str(error)
    return "fwd+bwd" if differentiable else "fwd"


def verdicts(name, builder):
    return {case: verdict("attention", shape, name, builder) for case, shape in CASES.items()}


def test_flash_attn_2(monkeypatch):
    """fastattn.flash_attn has its names and signatures."""
    install(monkeypatch, "flash_attn", **vars(fastattn.flash_attn))
    assert verdicts("flash-attn", attention_peers.build_flash_attn) == dict.fromkeys(CASES, "fwd+bwd") | {"sinks": "has no sinks"}


def test_flash_attn_3_and_4(monkeypatch):
    """These give the LSE too; the fourth calls its sinks learnable."""

    def dense(q, k, v, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0):
        return fastattn.attention(q, k, v, causal=causal, window=window_size, sinks=learnable_sink, softcap=softcap, return_lse=True)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, causal=False):
        lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return fastattn.attention(q, k, v, causal=causal, **lengths, return_lse=True)

    for module in ("flash_attn_interface", "flash_attn.cute"):
        install(monkeypatch, module, flash_attn_func=dense, flash_attn_varlen_func=varlen)
    expected = dict.fromkeys(CASES, "fwd+bwd") | {"dropout": "has no dropout"}
    assert verdicts("flash-attn-4", attention_peers.build_flash_attn_4) == expected
    assert verdicts("flash-attn-3", attention_peers.build_flash_attn_3) == expected | {"sinks": "has no sinks"}


def over_packed(function):
    """fastattn over what is packed, whatever a peer calls its arguments."""

    def call(q, k, v, starts, longest, window, **options):
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts.clone(), "max_seqlen_q": longest, "max_seqlen_k": longest}
        return fastattn.attention(q, k, v, window=window, **lengths, **options)

    return function(call)


def test_torch_varlen_attn(monkeypatch):
    @over_packed
    def varlen_attn(call):
        def function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
            assert enable_gqa and cu_seq_k is not None and max_k == max_q
            return call(query, key, value, cu_seq_q, max_q, window_size)

        return function

    install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)
    lacking = {"softcap": "has no softcap", "dropout": "has no dropout", "sinks": "has no sinks"}
    assert verdicts("torch varlen_attn", attention_peers.build_varlen_attn) == dict.fromkeys(CASES, "fwd+bwd") | lacking


def test_flashinfer_and_vllm_have_a_forward(monkeypatch):
    class Wrapper:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(self, starts, starts_k, heads, kv_heads, dim, causal, window_left, logits_soft_cap, q_data_type):
            assert (heads, kv_heads, dim, q_data_type) == (4, 2, 16, torch.float32)
            self.starts, self.window, self.softcap = starts, (window_left, 0 if causal else None), logits_soft_cap or 0.0

        @over_packed
        def run(call):
            return lambda self, q, k, v: call(q, k, v, self.starts, len(q), self.window, softcap=self.softcap)

    @over_packed
    def vllm(call):
        def function(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, causal=False, window_size=(-1, -1), softcap=0.0):
            left, right = window_size
            return call(q, k, v, cu_seqlens_q, max_seqlen_q, (left, 0 if causal else right), softcap=softcap)

        return function

    install(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Wrapper)
    install(monkeypatch, "vllm.vllm_flash_attn", flash_attn_varlen_func=vllm)
    expected = dict.fromkeys(CASES, "fwd") | {"dropout": "has no dropout"}
    assert verdicts("FlashInfer", attention_peers.build_flashinfer) == expected | {"sinks": "has no sinks in this wrapper"}
    assert verdicts("vLLM", attention_peers.build_vllm) == expected | {"sinks": "has no sinks in this build"}


def test_a_wrong_adapter_is_found_out(monkeypatch):
    deaf = {"flash_attn_func": lambda q, k, v, **options: fastattn.attention(q, k, v), "flash_attn_varlen_func": None}
    install(monkeypatch, "flash_attn", **deaf)
    assert "relative error" in verdict("attention", PLAIN, "flash-attn", attention_peers.build_flash_attn)


# --------------------------------------------------------------------------------------------------------------------
# Row ops.


def _rms(x, w, eps):
    return F.rms_norm(x, w.shape, w, eps)


def _write_norm(out, x, w, eps):
    out.copy_(_rms(x, w, eps))


def _add_in_place(x, residual, w, eps):
    residual += x
    x.copy_(_rms(residual, w, eps))


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _silu_and_mul(packed):
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up


def _fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
    assert topk_ids.dtype == torch.int32
    return fastattn.reference.moe(hidden_states, topk_ids.long(), topk_weights, w1, w2)


class _SiluAndMul:
    forward_cuda = staticmethod(_silu_and_mul)


STAND_INS = {
    "apex.normalization.fused_layer_norm": {
        "fused_rms_norm_affine": lambda x, w, shape, eps: F.rms_norm(x, shape, w, eps),
        "fused_layer_norm_affine": lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps),
    },
    "flashinfer": {"rmsnorm": lambda x, w, eps: _rms(x, w, eps), "fused_add_rmsnorm": _add_in_place, "silu_and_mul": _silu_and_mul},
    "vllm._custom_ops": {"rms_norm": _write_norm, "fused_add_rms_norm": _add_in_place},
    "vllm.model_executor.layers.activation": {"SiluAndMul": _SiluAndMul},
    "vllm.model_executor.layers.fused_moe": {"fused_experts": _fused_experts},
    "flash_attn.layers.rotary": {"apply_rotary_emb": _rotate},
    "quack.linear_cross_entropy": {"linear_cross_entropy": lambda x, w, t, reduction: F.cross_entropy(x @ w.t(), t, reduction=reduction)},
}


@pytest.mark.parametrize(
    ("op", "peer", "expected"),
    [
        ("norm", "apex", {"rms_norm": "fwd+bwd", "layer_norm": "fwd+bwd"}),
        ("norm", "FlashInfer", {"rms_norm": "fwd", "add_rms_norm": "fwd"}),
        ("norm", "vLLM", {"rms_norm": "fwd", "add_rms_norm": "fwd"}),
        ("glu", "FlashInfer", {"swiglu_packed": "fwd"}),
        ("glu", "vLLM", {"swiglu_packed": "fwd"}),
        ("rotary", "flash-attn", {"rotary": "fwd+bwd"}),
    ],
)
def test_row_ops(op, peer, expected, monkeypatch):
    for module, names in STAND_INS.items():
        install(monkeypatch, module, **names)
    found = suite.suite_of(op)
    builder = found.peers(torch.device("cuda"))[0][peer]
    shapes = {shape.function: shape for shape in found.presets["cpu", "tiny"]}
    assert {name: verdict(op, shapes[name], peer, builder) for name in expected} == expected
    for other in shapes.keys() - expected.keys():
        with pytest.raises((NotImplementedError, KeyError)):
            builder(shapes[other])


@pytest.mark.parametrize(("op", "peer", "expected"), [("linear_cross_entropy", "QuACK", "fwd+bwd"), ("moe", "vLLM", "fwd")])
def test_matrix_ops(op, peer, expected, monkeypatch):
    for module, names in STAND_INS.items():
        install(monkeypatch, module, **names)
    found = suite.suite_of(op)
    builder = found.peers(torch.device("cuda"))[0][peer]
    assert verdict(op, found.presets["cpu", "tiny"][0], peer, builder) == expected


@pytest.mark.parametrize("op", suite.OPS)
def test_what_is_not_installed_is_named_with_the_reason(op):
    present, absent = suite.suite_of(op).peers(torch.device("cuda"))
    assert list(present)[:2] == ["fastattn", "naive"]
    assert not set(present) & set(absent)
    assert all(reason for reason in absent.values())
