"""Every public op under torch's own machinery, the same questions for all: autocast, fake and meta tensors, export, AOTInductor,
checkpointing, torch.func's functional_call, FLOP counts. Derivatives, vmap and torch.compile are asked in each op's own tests."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from machinery_cases import CASES, ELSEWHERE
from op_contract import BF16, F16, F32, outputs
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.nn import Attention, LinearCrossEntropyLoss, MoE, MultiheadAttention, RMSNorm, SwiGLU

CASE = pytest.mark.parametrize("name", CASES)


def test_every_public_op_is_asked():
    functions = {name for name in fastattn.__all__ if inspect.isfunction(getattr(fastattn, name))}
    assert functions == (CASES.keys() - {"flash_attn", "moe_gather, moe_combine"}) | ELSEWHERE


# --------------------------------------------------------------------------------------------------------------------
# Autocast.


@CASE
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_autocast(name, dtype):
    """What torch's equivalent casts is cast to the region's dtype, and nothing else: the op of tensors cast beforehand, bit for bit."""
    case = CASES[name]
    tensors = case.make(5)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        got = outputs(case.op(**tensors))
    torch.manual_seed(1)
    expected = outputs(case.op(**{key: t.to(dtype) if key in case.cast else t for key, t in tensors.items()}))
    for mine, theirs in zip(got, expected, strict=True):
        if case.loss:  # of half precision, it is rounded there
            assert mine.dtype == F32
            torch.testing.assert_close(mine, theirs.float(), rtol=1e-2, atol=1e-2)
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("cache_dtype", [F16, BF16, F32, torch.int8])
def test_autocast_over_a_cache(dtype, cache_dtype):
    """Of another dtype than the queries: where norms are float32, as on CUDA, those of Attention(qk_norm=True) are."""
    tensors = CASES["paged_attention"].make(3)
    tensors |= {name: (4 * tensors[name]).to(cache_dtype) for name in ("k_cache", "v_cache")}
    with torch.autocast("cpu", dtype):
        out = fastattn.paged_attention(**tensors)
    q = tensors.pop("q").to(dtype if cache_dtype == torch.int8 else cache_dtype)
    assert torch.equal(out, fastattn.paged_attention(q, **tensors))


MODULES = {
    "Attention": lambda: Attention(16, 4, 2, qk_norm=True, sinks=True),
    "MultiheadAttention": lambda: Called(MultiheadAttention(16, 4, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "MoE": lambda: Called(MoE.deepseek_v3(16, 8, 4, 2, num_groups=2, top_k_groups=1), lambda m, x: m(x)[0]),
    "RMSNorm": lambda: Called(RMSNorm(16), lambda m, x: m(x, x)[0]),
    "SwiGLU": lambda: SwiGLU(),
    "LinearCrossEntropyLoss": lambda: Called(LinearCrossEntropyLoss(16, 7), lambda m, x: m(x, torch.ones(x.shape[:-1], dtype=torch.int64))),
}


class Called(torch.nn.Module):
    """A module as a function of one tensor."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_modules_train_under_autocast(name, dtype):
    module, x = MODULES[name](), torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype):
        out = module(x)
    kept = name in ("RMSNorm", "SwiGLU", "LinearCrossEntropyLoss")
    assert out.dtype == (F32 if kept else dtype)
    torch.testing.assert_close(out.float(), module(x), rtol=5e-2, atol=5e-2)
    if out.requires_grad:
        out.float().square().sum().backward()
        assert all(p.grad.dtype == F32 and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------------------------
# Tensors without data.


@CASE
def test_fake_and_meta_tensors(name):
    case = CASES[name]
    tensors = case.make(5)
    expected = [(t.shape, t.dtype, t.stride()) for t in outputs(case.op(**tensors))]
    with FakeTensorMode() as mode:
        fake = outputs(case.op(**{key: mode.from_tensor(t) for key, t in tensors.items()}))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == expected
    if name == "cascade_attention":  # the function here makes a tensor of its own
        return
    meta = outputs(case.op(**{key: t.to("meta") for key, t in tensors.items()}))
    assert [(t.shape, t.dtype, t.stride()) for t in meta] == expected and all(t.is_meta for t in meta)


# --------------------------------------------------------------------------------------------------------------------
# Export.


class AllOps(torch.nn.Module):
    """All of them in one program, or those named; of a dict of their tensors."""

    def __init__(self, names):
        super().__init__()
        self.names = list(names)

    def forward(self, tensors: dict[str, dict[str, Tensor]]) -> list[list[Tensor]]:
        return [outputs(CASES[name].op(**tensors[name])) for name in self.names]


def sized(names, n):
    return {name: CASES[name].make(n) for name in names}


def dynamic(names):
    """The dims that n tokens, sequences or rows make."""
    small, large = sized(names, 3), sized(names, 4)
    auto = torch.export.Dim.AUTO
    return {
        name: {key: {d: auto for d in range(t.dim()) if t.shape[d] != large[name][key].shape[d]} for key, t in of.items()}
        for name, of in small.items()
    }


EXPORTED = [name for name in CASES if name != "sample"]  # its seed is the program's own


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.more)], ids=["non-strict", "strict"])
def test_export_with_dynamic_sizes(strict):
    model = AllOps(EXPORTED)
    program = torch.export.export(model, (sized(EXPORTED, 5),), dynamic_shapes=(dynamic(EXPORTED),), strict=strict)
    for n in (4, 7):
        tensors = sized(EXPORTED, n)
        for name, mine, theirs in zip(EXPORTED, program.module()(tensors), model(tensors), strict=True):
            assert all(map(torch.equal, mine, theirs)), name


class Decoder(torch.nn.Module):
    """A small language model of fastattn.nn."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm1, self.norm2 = torch.nn.Embedding(11, 16), RMSNorm(16), RMSNorm(16)
        self.attn, self.moe, self.loss = Attention(16, 4, 2, qk_norm=True), MoE.mixtral(16, 8, 4), LinearCrossEntropyLoss(16, 11)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        y, x = self.norm2(self.attn(self.norm1(x), cos, sin), x)
        x = x + self.moe(y)[0]
        return x, self.loss(x, tokens)


def sentences(batch, length):
    angles = torch.arange(32)[:, None] / 100 ** (torch.arange(0, 4, 2) / 4)
    return torch.randint(11, (batch, length)), angles.cos(), angles.sin()


LENGTHS = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=32)}, None, None)


def test_a_model_is_exported_with_dynamic_sizes(tmp_path):
    model = Decoder().eval()
    program = torch.export.export(model, sentences(2, 6), dynamic_shapes=LENGTHS)
    torch.export.save(program, tmp_path / "decoder.pt2")
    loaded = torch.export.load(tmp_path / "decoder.pt2").module()
    for size in ((1, 5), (3, 9)):
        given = sentences(*size)
        torch.testing.assert_close(loaded(*given), model(*given))


@pytest.mark.more
def test_aot_inductor_packages(tmp_path):
    """A model and single ops, compiled ahead with dynamic sizes, loaded, and run: as eager."""
    model = Decoder().eval()
    program = torch.export.export(model, sentences(2, 6), dynamic_shapes=LENGTHS)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decoder.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for size in ((2, 5), (3, 9)):
        given = sentences(*size)
        with torch.no_grad():
            torch.testing.assert_close(tuple(loaded(*given)), model(*given))

    names = ["attention", "add_rms_norm", "layer_norm", "moe", "linear_cross_entropy", "softmax", "swiglu", "apply_rotary", "grouped_mm"]
    ops = AllOps(names)
    program = torch.export.export(ops, (sized(names, 5),), dynamic_shapes=(dynamic(names),))
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ops.pt2"))
    )
    for n in (4, 7):
        tensors = sized(names, n)
        for name, mine, theirs in zip(names, loaded(tensors), ops(tensors), strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda message, name=name: f"{name}: {message}")


# --------------------------------------------------------------------------------------------------------------------
# Checkpointing, functional_call.


def dropped(x, residual):
    return fastattn.add_layer_norm(x, residual, 12, dropout_p=0.5)[0]


CHECKPOINTED = {
    "norm with dropout": (dropped, lambda: (torch.randn(4, 12), torch.randn(4, 12))),
    "attention with dropout": (
        lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5, causal=True), lambda: tuple(torch.randn(3, 1, 7, 2, 8).unbind())
    ),
    "moe": (
        lambda x, up, down: fastattn.moe(x, torch.arange(10).view(5, 2) % 3, torch.full((5, 2), 0.5), up, down),
        lambda: (torch.randn(5, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)),
    ),
    "linear_cross_entropy": (
        lambda x, w: fastattn.linear_cross_entropy(x, w, torch.tensor([1, 2, 0])), lambda: (torch.randn(3, 8), torch.randn(11, 8))
    ),
}  # fmt: skip


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_repeats_the_forward(name, use_reentrant):
    op, make = CHECKPOINTED[name]
    tensors = make()

    def run(call):
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        torch.manual_seed(4)  # somewhere else, as the recomputation finds it
        out.backward(torch.ones_like(out))
        return [out, *(leaf.grad for leaf in leaves)]

    expected, got = run(op), run(lambda *leaves: checkpoint(op, *leaves, use_reentrant=use_reentrant))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", MODULES)
def test_functional_call_and_its_gradient(name):
    module, x = MODULES[name](), torch.randn(2, 3, 16)
    parameters = {key: p.detach() for key, p in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    expected = {key: p.grad for key, p in module.named_parameters()}
    torch.testing.assert_close(got, (expected, leaf.grad))


# --------------------------------------------------------------------------------------------------------------------
# FLOPs.

# Of n = 5: multiply-adds ×2 of the forward, and of the backward (of gradients of all floating tensors).
PAIRS = 4 * 5 * (1 + 2 + 3 + 4 + 5 + 6)  # heads · batch · visible keys
SEEN = 4 * (1 + 2 + 3 + 4 + 5)
FLOPS = {
    "attention": (2 * PAIRS * 16, 2 * PAIRS * 40),
    "flash_attn": (2 * PAIRS * 16, 2 * PAIRS * 40),
    "scaled_dot_product_attention": (0, 0),  # on the CPU it is torch's own, which counts nothing there
    "paged_attention": (2 * SEEN * 16, None),
    "cascade_attention": (2 * SEEN * 16 + 2 * 5 * 4 * 4 * 16, None),  # each query over the prefix's page of 4
    "linear_cross_entropy": (3 * 2 * 5 * 8 * 11, 0),  # gradients are made in the forward
    "grouped_mm": (2 * 5 * 8 * 6, 2 * 2 * 5 * 8 * 6),
    "moe": (3 * 2 * 10 * 8 * 6, 6 * 2 * 10 * 8 * 6),
}


@CASE
def test_flops_are_counted(name):
    case = CASES[name]
    learnt = FLOPS.get(name, (0, 0))[1] is not None and name not in ("sample", "sampling_probs", "moe_expert_counts", "append_paged_kv")
    tensors = {key: t.requires_grad_(learnt and t.is_floating_point() and key not in ("cos", "sin")) for key, t in case.make(5).items()}
    with FlopCounterMode(display=False) as counter:
        outs = outputs(case.op(**tensors))
    forward = counter.get_total_flops()
    with counter:
        if learnt:
            torch.autograd.backward([t for t in outs if t.requires_grad], [torch.ones_like(t) for t in outs if t.requires_grad])
    assert (forward, counter.get_total_flops() if learnt else None) == FLOPS.get(name, (0, 0 if learnt else None))


# --------------------------------------------------------------------------------------------------------------------
# The table in docs/torch.md says what holds.


# What runs where it is not an operator of the op's own name.
OPERATORS = {
    "scaled_dot_product_attention": "attention", "cascade_attention": "paged_attention", "apply_rotary": "rotary", "swiglu": "glu",
    "geglu": "glu", **dict.fromkeys(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"), "norm"),
}  # fmt: skip


def test_the_table_of_the_documentation():
    from fastattn.integrations.dtensor import RULES

    page = (Path(__file__).parent.parent / "docs" / "torch.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)`", cells[0]) for cells in rows]
    assert sorted(sum(named, [])) == sorted(name for name in fastattn.__all__ if inspect.isfunction(getattr(fastattn, name)))
    for names, (_, autocast, flops, sharded, _) in zip(named, rows, strict=True):
        for name in names:
            case, operator = CASES.get(name), OPERATORS.get(name, name)
            casts = name in ("paged_attention", "cascade_attention") or bool(case and case.cast)
            assert autocast.startswith("casts") == casts, name
            assert bool(flops) == (name in FLOPS), name
            assert bool(sharded) == bool({operator, f"{operator}_fwd"} & RULES.keys()), name
