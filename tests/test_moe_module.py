"""fastattn.nn.MoE: transformers' blocks by their weights, routing, capacity, the shared expert, what balances the load.

On the CPU path; `both` tests also run on the kernels.
"""

from __future__ import annotations

import copy
import gc
import math
from fractions import Fraction
from importlib import import_module

import pytest
import torch
from torch import nn

import fastattn
from fastattn import reference
from fastattn.nn import MoE
from fastattn.testing.budget import check_budget

BF16, F32 = torch.bfloat16, torch.float32

# --------------------------------------------------------------------------------------------------------------------
# transformers' blocks.

BLOCKS = {
    "mixtral": ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", dict(intermediate_size=24, num_local_experts=6)),
    "qwen3": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", dict(moe_intermediate_size=24, num_experts=6, norm_topk_prob=False)),
    "qwen3 normed": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", dict(moe_intermediate_size=24, num_experts=6, norm_topk_prob=True)),
    "gpt-oss": ("gpt_oss", "GptOssConfig", "GptOssMLP", dict(intermediate_size=24, num_local_experts=6)),
    "deepseek": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", dict(
        moe_intermediate_size=24, n_routed_experts=6, n_group=3, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
        n_shared_experts=2,
    )),
}  # fmt: skip
NAMED = pytest.mark.parametrize("name", BLOCKS)


def block_of(name, dtype=F32, **others):
    """A transformers block of eager experts with random weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder, config, block, fields = BLOCKS[name]
    config = getattr(transformers, config)(hidden_size=32, num_experts_per_tok=3, **{"hidden_act": "silu"} | fields | others)
    config._experts_implementation = "eager"
    made = getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), block)(config)
    for t in (*made.parameters(), *made.buffers()):
        nn.init.normal_(t, std=0.3)
    return made.to(dtype)


def results_of(module, x, dout):
    """Output and the gradients of x and of every parameter, by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out, [x, *module.parameters()], dout)
    names = [name.replace("router.", "gate.") for name, _ in module.named_parameters()]
    return {"out": out.detach(), "dx": grads[0]} | dict(zip(names, grads[1:], strict=True))


def choices_of(block, x):
    """Each token's experts in ascending order, by the block's own router."""
    router = block.router if hasattr(block, "router") else block.gate
    with torch.no_grad():
        return router(x.flatten(0, -2))[2].sort(-1).values


@pytest.mark.both
@NAMED
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_transformers_block_by_its_weights(name, dtype):
    block = block_of(name, dtype)
    ours, double = MoE.from_transformers(block), copy.deepcopy(block).double()
    x, dout = torch.randn(2, 80, 32).to(dtype)
    # A token whose choice hangs on a rounding of its logits has other experts in float64, and nothing to be held to.
    same = (choices_of(block, x) == choices_of(double, x.double())).all(-1)
    assert same.float().mean() > 0.9
    x, dout = x[same][None], dout[same][None]
    got, naive, truth = results_of(ours, x, dout), results_of(block, x, dout), results_of(double, x.double(), dout.double())
    assert got.keys() == naive.keys()
    for key, value in got.items():
        check_budget(f"{name} {key}", value, naive[key], truth[key])


@NAMED
def test_presets_have_the_names_and_shapes_of_transformers(name):
    block = block_of(name)
    preset = {"mixtral": MoE.mixtral, "qwen3": MoE.qwen3_moe, "gpt-oss": MoE.gpt_oss, "deepseek": MoE.deepseek_v3}[name.split()[0]]
    groups = dict(num_groups=3, top_k_groups=2, num_shared_experts=2) if name == "deepseek" else {}
    ours = preset(32, 24, 6, 3, **groups)
    expected = {key.replace("router.", "gate."): value for key, value in block.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == {key: value.shape for key, value in expected.items()}
    model = nn.ModuleDict({"mlp": ours})
    model.load_state_dict({f"mlp.{key}": value for key, value in block.state_dict().items()})
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_other_blocks_are_refused():
    with pytest.raises(TypeError, match=r"MoE: block must be one of transformers 5's MixtralSparseMoeBlock, .*, got Linear"):
        MoE.from_transformers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name, others, message",
    [
        ("mixtral", dict(hidden_act="gelu_pytorch_tanh"), r"have act_fn = SiLU, got GELUTanh"),
        ("qwen3", dict(hidden_act="relu"), r"have act_fn = SiLU, got ReLU"),
        ("deepseek", dict(hidden_act="gelu"), r"have act_fn = SiLU, got GELUActivation"),
        ("mixtral", dict(router_jitter_noise=0.1), r"have jitter_noise = 0.0, got 0.1"),
        ("gpt-oss", dict(swiglu_limit=5.0), r"have limit = 7.0, got 5.0"),
        ("gpt-oss", dict(swiglu_alpha=1.0), r"have alpha = 1.702, got 1.0"),
    ],
    ids=str,
)
def test_blocks_that_compute_something_else_are_refused(name, others, message):
    with pytest.raises(ValueError, match=f"MoE: block must {message}"):
        MoE.from_transformers(block_of(name, **others))


def test_a_shared_expert_of_another_activation_is_refused():
    block = block_of("deepseek")
    block.shared_experts.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match="MoE: block must have act_fn = SiLU, got ReLU"):
        MoE.from_transformers(block)


def test_a_block_of_several_dtypes_is_refused():
    block = block_of("mixtral", BF16)
    block.gate.float()
    with pytest.raises(TypeError, match=r"MoE: block must have parameters of one dtype, got torch.bfloat16 and torch.float32"):
        MoE.from_transformers(block)


def test_a_block_without_experts_of_one_tensor_is_refused():
    """As transformers 4 had them."""
    block = block_of("mixtral")
    del block.experts
    with pytest.raises(TypeError, match=r"MoE: block must be one of transformers 5's MixtralSparseMoeBlock"):
        MoE.from_transformers(block)


def test_a_block_without_shared_experts():
    block, x = block_of("deepseek", n_shared_experts=0), torch.randn(1, 9, 32)
    torch.testing.assert_close(MoE.from_transformers(block)(x)[0], block(x), rtol=1e-4, atol=1e-4)


def test_what_is_frozen_stays_so():
    block = block_of("gpt-oss")
    block.router.weight.requires_grad_(False)
    block.experts.down_proj.requires_grad_(False)
    frozen = {name for name, p in MoE.from_transformers(block).named_parameters() if not p.requires_grad}
    assert frozen == {"gate.weight", "experts.down_proj"}


@pytest.mark.parametrize("act", ["silu", "swish"])
def test_a_block_keeps_its_mode_and_dtype(act):
    block = block_of("mixtral", BF16, hidden_act=act).eval()
    layer = MoE.from_transformers(block)
    assert not any(module.training for module in layer.modules())
    assert {p.dtype for p in layer.parameters()} == {BF16}
    assert MoE.from_transformers(block.train()).training


# --------------------------------------------------------------------------------------------------------------------
# What it computes.


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, dict(score="sigmoid", renormalize=True, scaling_factor=2.0), dict(num_groups=2, top_k_groups=1)], ids=str)
@pytest.mark.parametrize("shared", [None, 20])
def test_is_router_experts_and_shared_expert(options, shared):
    layer, x = MoE(16, 12, 8, 2, shared_intermediate_size=shared, **options), torch.randn(3, 5, 16)
    out, aux = layer(x)
    tokens = x.view(-1, 16)
    logits = tokens @ layer.gate.weight.T
    weights, indices = reference.moe_route(logits, 2, **options)
    expected = reference.moe(tokens, indices, weights, layer.experts.gate_up_proj, layer.experts.down_proj)
    if shared:
        mlp = layer.shared_experts
        expected = expected + mlp.down_proj(reference.swiglu(mlp.gate_proj(tokens), mlp.up_proj(tokens)))
    assert out.shape == x.shape
    torch.testing.assert_close(out.view(-1, 16), expected, rtol=1e-4, atol=1e-5)
    assert aux.expert_counts.tolist() == [(indices == e).sum().item() for e in range(8)]
    torch.testing.assert_close(aux.z_loss, logits.logsumexp(1).square().mean())
    probs = logits.softmax(1) if "score" not in options else logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    torch.testing.assert_close(aux.load_balancing_loss, 8 * (aux.expert_counts / len(tokens) * probs.mean(0)).sum())
    (aux.load_balancing_loss + aux.z_loss).backward()
    assert layer.gate.weight.grad.abs().sum() > 0 and layer.experts.down_proj.grad is None


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_balancing_loss_is_transformers_(name):
    block, x = block_of(name), torch.randn(1, 60, 32)
    module = import_module(f"transformers.models.{BLOCKS[name][0]}.modeling_{BLOCKS[name][0]}")
    router = block.router if hasattr(block, "router") else block.gate
    logits = router(x.flatten(0, 1))[0]
    expected = module.load_balancing_loss_func((logits,), 6, 3)
    layer = MoE.from_transformers(block)
    loss = layer(x)[1].load_balancing_loss
    torch.testing.assert_close(loss, expected)
    (wanted,), (got,) = torch.autograd.grad(expected, [router.weight]), torch.autograd.grad(loss, [layer.gate.weight])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def dropped_by_hand(indices, num_experts, factor):
    """Each expert's first ⌈factor·slots / num_experts⌉ slots keep their id."""
    left = [math.ceil(Fraction(str(factor)) * indices.numel() / num_experts)] * num_experts
    kept = indices.clone().flatten()
    for slot, expert in enumerate(indices.flatten().tolist()):
        if left[expert] == 0:
            kept[slot] = num_experts
        else:
            left[expert] -= 1
    return kept.view(indices.shape)


@pytest.mark.both
@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.25, 8.0])
def test_capacity_drops_who_comes_late(factor):
    layer, x = MoE(16, 12, 8, 2, capacity_factor=factor), torch.randn(70, 16) + 0.5
    weights, indices = fastattn.moe_route(layer.gate(x), 2)
    kept = dropped_by_hand(indices, 8, factor)
    assert torch.equal(layer._within_capacity(indices, fastattn.moe_dispatch(indices, layer.num_experts)), kept)
    assert ((kept == 8).any() or factor == 8.0) and (factor < 8.0 or torch.equal(kept, indices))
    out, aux = layer(x)
    torch.testing.assert_close(out, fastattn.moe(x, kept, weights, layer.experts.gate_up_proj, layer.experts.down_proj))
    assert aux.expert_counts.sum() == 140


@pytest.mark.parametrize(
    "factor, slots, capacity", [(1.1, 100, 11), (1.2, 50, 6), (0.7, 100, 7), (1 / 3, 90, 3), (1e-9, 100, 1), (1e30, 100, 100), (Fraction(11, 10), 100, 11)]
)  # fmt: skip
def test_capacity_is_counted_exactly(factor, slots, capacity):
    """1.1·100 / 10 is 11.000000000000002 in floating point."""
    indices = torch.zeros(slots, 1, dtype=torch.int64)
    kept = MoE(16, 12, 10, 1, capacity_factor=factor)._within_capacity(indices, fastattn.moe_dispatch(indices, 10))
    assert (kept == 0).sum() == capacity and not kept[:capacity].any()


def test_experts_of_ones_own():
    """By transformers' signature, in the layer's place."""

    class Mine(torch.nn.Module):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states * top_k_weights.sum(-1, keepdim=True)

    layer, x = MoE(16, 12, 10, 2), torch.randn(5, 16)
    layer.experts = Mine()
    assert layer(x)[0].shape == x.shape


def test_a_capacity_may_be_set_later():
    layer, indices = MoE(16, 12, 10, 1), torch.zeros(100, 1, dtype=torch.int64)
    for factor, capacity in ((1.1, 11), (0.5, 5)):
        layer.capacity_factor = factor
        assert (layer._within_capacity(indices, fastattn.moe_dispatch(indices, layer.num_experts)) == 0).sum() == capacity and f"capacity_factor={factor}" in repr(layer)
    with pytest.raises(ValueError, match="MoE: capacity_factor must be None or positive and finite, got -1"):
        layer.capacity_factor = -1
    layer.capacity_factor = None
    assert layer(torch.randn(3, 16))[0].shape == (3, 16)


@pytest.mark.both
def test_a_dropped_slot_has_no_gradient():
    layer, x = MoE(16, 12, 4, 2, capacity_factor=0.5), torch.randn(40, 16, requires_grad=True)
    weights, indices = fastattn.moe_route(layer.gate(x), 2)
    kept = dropped_by_hand(indices, 4, 0.5)
    expected = reference.moe(x, kept, weights, layer.experts.gate_up_proj, layer.experts.down_proj)
    leaves, dout = [x, *layer.parameters()], torch.randn(40, 16)
    wanted, got = torch.autograd.grad(expected, leaves, dout), torch.autograd.grad(layer(x)[0], leaves, dout)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    lost = (kept == 4).all(-1)
    assert lost.any() and not got[0][lost].any()


def test_nothing_reads_a_value():
    """On the meta device there are none: what would wait for a GPU raises."""
    layer = MoE.deepseek_v3(16, 12, 8, 2, num_groups=2, top_k_groups=1, capacity_factor=1.0, device="meta")
    out, aux = layer(torch.empty(3, 5, 16, device="meta"))
    (out.sum() + aux.load_balancing_loss + aux.z_loss).backward()
    assert out.shape == (3, 5, 16) and aux.expert_counts.shape == (8,) and layer.gate.weight.grad.shape == (8, 16)


def test_a_selection_bias_balances_the_load():
    layer, x = MoE(16, 12, 8, 2, score="sigmoid", selection_bias=True), torch.randn(300, 16) + 1.0
    spread = []
    for _ in range(150):
        with torch.no_grad():
            counts = layer(x)[1].expert_counts
        spread.append((counts.max() - counts.min()).item())
        layer.update_bias(counts, 0.01)
    assert spread[0] > 60 and max(spread[-10:]) < spread[0] / 2
    assert "gate.e_score_correction_bias" in layer.state_dict() and layer.gate.e_score_correction_bias.abs().sum() > 0


@pytest.mark.both
@pytest.mark.parametrize("shape", [(0, 16), (16,), (2, 0, 16), (1, 1, 16)], ids=str)
def test_any_number_of_tokens(shape):
    layer = MoE.mixtral(16, 12, 4, 2)
    x = torch.randn(shape, requires_grad=True)
    out, aux = layer(x)
    assert out.shape == x.shape and aux.expert_counts.sum() == 2 * (x.numel() // 16)
    out.sum().backward()
    assert x.grad.shape == x.shape and layer.experts.gate_up_proj.grad.isfinite().all()


COMPILED = {
    "mixtral": lambda: MoE.mixtral(16, 12, 8, 2),
    "gpt-oss": lambda: MoE.gpt_oss(16, 12, 8, 2),
    "deepseek capacity": lambda: MoE.deepseek_v3(16, 12, 8, 2, num_groups=2, top_k_groups=1, capacity_factor=1.0),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    torch._dynamo.reset()
    layer = COMPILED[name]()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (50, 21):
        x, results = torch.randn(num_tokens, 16), []
        for module in (compiled, layer):
            out, aux = module(x)
            grads = torch.autograd.grad(out.sum() + aux.load_balancing_loss + aux.z_loss, list(layer.parameters()))
            results.append([out, *aux, *grads])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_under_autocast_it_computes_in_half_precision():
    layer, x = MoE.gpt_oss(16, 12, 4, 2), torch.randn(30, 16)
    with torch.autocast("cpu", BF16):
        out, aux = layer(x)
        assert layer.gate(x).dtype == BF16
    assert out.dtype == BF16 and aux.z_loss.dtype == F32
    out.float().sum().backward()
    assert layer.experts.gate_up_proj.grad.dtype == F32
    torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_float32_router_is_one_under_autocast_and_in_half_precision(bias):
    layer, x = MoE(16, 12, 8, 2, router_fp32=True, router_bias=bias), torch.randn(30, 16)
    logits = layer.gate(x)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer.gate(x), logits)
        layer(x)[0].float().sum().backward()
    assert layer.gate.weight.grad.dtype == F32 and layer.gate.weight.grad.any()
    half = layer.to(BF16)
    truth = nn.functional.linear(x.to(BF16).double(), half.gate.weight.double(), half.gate.bias.double() if bias else None)
    assert half.gate(x.to(BF16)).dtype == F32
    torch.testing.assert_close(half.gate(x.to(BF16)), truth.float(), rtol=1e-5, atol=1e-6)


def test_a_selection_bias_keeps_its_digits():
    layer = MoE(16, 12, 4, 2, score="sigmoid", selection_bias=True)
    layer.update_bias(torch.tensor([0, 1, 2, 1]), 0.5)
    for convert in (lambda: layer.to(BF16), lambda: layer.half(), lambda: layer.to("meta", BF16)):
        convert()
        assert layer.gate.e_score_correction_bias.dtype == F32
        if not layer.gate.weight.is_meta:
            before = layer.gate.e_score_correction_bias.clone()
            layer.update_bias(torch.tensor([0, 1, 2, 1]), 1e-3)
            torch.testing.assert_close(layer.gate.e_score_correction_bias - before, torch.tensor([1e-3, 0, -1e-3, 0]))


def test_state_dict_copy_and_repr():
    layer = MoE.deepseek_v3(16, 12, 8, 2, num_groups=2, top_k_groups=1, dtype=BF16)
    other = MoE.deepseek_v3(16, 12, 8, 2, num_groups=2, top_k_groups=1, dtype=BF16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16).to(BF16)
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x)[0], layer(x)[0])
    for assign in (False, True):
        other.load_state_dict({name: t.to(BF16) for name, t in layer.state_dict().items()}, assign=assign)
        assert other.gate.e_score_correction_bias.dtype == F32
    for shown in ("top_k=2", "score='sigmoid'", "renormalize=True", "top_k_groups=1", "Router(16, 8", "Experts(8, 16, 12", "layout='conc"):
        assert shown in repr(layer), shown
    assert layer.gate.e_score_correction_bias.dtype == F32 and layer.experts.down_proj.dtype == BF16


def test_made_without_memory_and_filled():
    with torch.device("meta"):
        assert MoE.mixtral(4096, 14336).experts.gate_up_proj.shape == (8, 28672, 4096)
        layer = MoE.deepseek_v3(16, 12, 8, 2, num_groups=2, top_k_groups=1)
    layer.to_empty(device="cpu")
    for t in (*layer.parameters(), *layer.buffers()):
        nn.init.constant_(t, 7.0)
    layer.reset_parameters()
    for name, p in layer.named_parameters():
        bound = (12 if "down_proj" in name else 16) ** -0.5
        assert 0.8 * bound < p.abs().max() <= bound, name
    assert not layer.gate.e_score_correction_bias.any()


def test_a_copy_loads_gpt_oss_s_router_after_the_original_is_gone():
    layer = MoE.gpt_oss(16, 12, 4, 2)
    weights = {key.replace("gate.", "router."): value + 1 for key, value in layer.state_dict().items()}
    twin = copy.deepcopy(layer)
    del layer
    gc.collect()
    twin.load_state_dict(weights)
    assert torch.equal(twin.gate.weight, weights["router.weight"]) and "router.weight" in weights


ERRORS = {
    "hidden_size must be positive, got 0": dict(hidden_size=0),
    "top_k must be at most num_experts = 4, got 5": dict(top_k=5),
    "top_k must be an int, got float": dict(top_k=2.0),
    "capacity_factor must be None or positive and finite, got 0": dict(capacity_factor=0),
    "capacity_factor must be None or positive and finite, got inf": dict(capacity_factor=math.inf),
    "capacity_factor must be a Python number, got str": dict(capacity_factor="1"),
    "shared_intermediate_size must be positive, got 0": dict(shared_intermediate_size=0),
    "activation must be one of 'swiglu', 'geglu', 'clamped_swiglu', got 'relu'": dict(activation="relu"),
    "layout must be one of 'concatenated', 'interleaved', got 'x'": dict(layout="x"),
    "dtype must be float16, bfloat16 or float32, got torch.float64": dict(dtype=torch.float64),
    "dtype must be float16, bfloat16 or float32, got torch.int32": dict(dtype=torch.int32),
}
REFUSED_BY_ROUTE = {
    "score must be one of 'softmax', 'sigmoid', got 'relu'": dict(score="relu"),
    "order must be one of .*, got 'x'": dict(order="x"),
    "logits must have at most 512 experts": dict(num_experts=513),
    "num_groups must divide the number of experts 4, got 3": dict(num_groups=3, top_k_groups=1),
    "num_groups and top_k_groups must be given together": dict(num_groups=2),
    "scaling_factor must be finite, got inf": dict(scaling_factor=math.inf),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    sizes = dict(hidden_size=16, intermediate_size=12, num_experts=4, top_k=2)
    with pytest.raises((ValueError, TypeError)) as error:
        MoE(**(sizes | ERRORS[message]))
    assert str(error.value) == f"MoE: {message}"


@pytest.mark.parametrize("message", REFUSED_BY_ROUTE)
def test_routing_that_cannot_be_is_refused_at_construction(message):
    sizes = dict(hidden_size=16, intermediate_size=12, num_experts=4, top_k=2)
    with pytest.raises(ValueError, match=f"moe_route: {message}"):
        MoE(**(sizes | REFUSED_BY_ROUTE[message]))


def test_errors_of_a_forward():
    layer = MoE.mixtral(16, 12, 4, 2)
    with pytest.raises(ValueError, match=r"MoE: x must have shape \(…, H\) with H = 16, got \(3, 8\)"):
        layer(torch.randn(3, 8))
    with pytest.raises(TypeError, match="MoE: x must be a torch.Tensor, got list"):
        layer([1.0])
    with pytest.raises(TypeError, match="MoE: x must be float16, bfloat16 or float32, got torch.int64"):
        layer(torch.zeros(3, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match="MoE: x must have the router's dtype torch.float32, got torch.bfloat16"):
        layer(torch.zeros(3, 16, dtype=BF16))
    with pytest.raises(ValueError, match="MoE: x must be on the router's device cpu, got meta"):
        layer(torch.zeros(3, 16, device="meta"))
    with pytest.raises(ValueError, match="MoE: selection_bias must be True to update it, got False"):
        layer.update_bias(torch.zeros(4))
