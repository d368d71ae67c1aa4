"""A mixture of experts: the kernels in the interpreter and the CPU path against a float64 loop, transformers' experts, the operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_contract import (
    BF16,
    F16,
    F32,
    INPUT_LAYOUTS,
    UPSTREAM_LAYOUTS,
    check_compiled,
    check_op,
    check_operator,
    check_pure,
    check_transforms,
    launched_on,
    run,
    runs_as_on_cuda,
    upstream,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import reference

NAN = float("nan")
GPT_OSS = dict(activation="clamped_swiglu", layout="interleaved", transposed=True)
OPTIONS = pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["mixtral", "gpt-oss"])


def even(*shape, scale=1.0):
    """Numbers of variance scale² without outliers: of heavier tails, a largest error is that of one element, and a matter of luck."""
    return scale * 3**0.5 * (2 * torch.rand(shape) - 1)


def draw(
    num_tokens=48, hidden=40, inner=33, num_experts=3, top_k=2, dtype=F32, *, biases=True, sentinels=True, clamped=False,
    transposed=False, **options,
):  # fmt: skip
    """(tensors, indices): of random ids, some are nobody's, and a token may name one twice. clamped: biases that carry many gates and ups
    well past gpt-oss's limits, and none near them. Takes moe's options; whether matrices are transposed is one."""
    tensors = {
        "x": even(num_tokens, hidden),
        "gate_up_proj": even(num_experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down_proj": even(num_experts, hidden, inner, scale=inner**-0.5),
    }
    if transposed:
        tensors |= {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if t.dim() == 3}
    if biases:
        far = 25.0 * torch.randint(-1, 2, (num_experts, 2 * inner)) if clamped else 0.0
        tensors |= {"gate_up_bias": even(num_experts, 2 * inner) + far, "down_bias": even(num_experts, hidden)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | {"top_k_weights": 0.5 + 0.5 * torch.rand(num_tokens, top_k)}
    return tensors, torch.randint(num_experts + sentinels, (num_tokens, top_k))


def of(indices, **options):
    """(op, oracle) as functions of tensors by name."""
    return (lambda **tensors: fastattn.moe(top_k_index=indices, **tensors, **options)), (
        lambda **tensors: reference.moe(top_k_index=indices, **tensors, **options)
    )


def check(tensors, indices, douts=None, **options):
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    douts = [even(*tensors["x"].shape).to(tensors["x"].dtype)] if douts is None else douts
    return check_op(f"moe {shapes} {options}", *of(indices, **options), tensors, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.


CHOICES = itertools.product(
    enumerate(["swiglu", "geglu", "clamped_swiglu"]), enumerate(["concatenated", "interleaved"]), enumerate([False, True]),
    enumerate([F32, F16, BF16]),
)  # fmt: skip
# All of them on the CPU; on the kernels each dtype with a third, and the rest at length.
CASES = [
    pytest.param(*values, marks=[pytest.mark.both] * (sum(places) % 3 == 0), id="-".join(map(str, values)).replace("torch.", ""))
    for places, values in (zip(*choice) for choice in CHOICES)
]


@pytest.mark.parametrize("activation, layout, transposed, dtype", CASES)
def test_values(activation, layout, transposed, dtype):
    options = dict(activation=activation, layout=layout, transposed=transposed)
    tensors, indices = draw(dtype=dtype, clamped=activation == "clamped_swiglu", **options)
    result = check(tensors, indices, **options)
    assert result["out0"].dtype == dtype and result["out0"].is_contiguous() and result["dtop_k_weights"].dtype == F32
    assert len(result) == 7


@pytest.mark.interpret
@pytest.mark.more
@pytest.mark.parametrize("activation, layout, transposed, dtype", [case.values for case in CASES if not case.marks], ids=str)
def test_the_other_values_on_the_kernels(activation, layout, transposed, dtype):
    test_values(activation, layout, transposed, dtype)


@pytest.mark.both
@OPTIONS
@pytest.mark.parametrize("biases", [(), ("gate_up_bias",), ("down_bias",)], ids=["none", "the first", "the second"])
def test_biases(biases, options):
    tensors, indices = draw(dtype=BF16, **options)
    check({name: t for name, t in tensors.items() if "bias" not in name or name in biases}, indices, **options)


# (H, I): nothing is a multiple of anything.
SIZES = [(1, 1), (3, 7), (7, 1), (1, 33), (33, 3), (40, 100), (100, 40), (64, 64)]


@pytest.mark.both
@pytest.mark.parametrize("number", range(len(SIZES)), ids=lambda number: str(SIZES[number]))
def test_sizes(number):
    options = (GPT_OSS, {})[number % 2]
    check(*draw(48, *SIZES[number], **options), **options)


NUMBERS = list(enumerate([1, 3, 7, 33, 40, 100]))
# In half precision the larger ones: gradients of few elements, each a sum over some 250 rounded rows, have a largest error that is a
# matter of luck, the baseline's too. On the kernels each size in one dtype.
EVERY_SIZE = [
    pytest.param(
        hidden, inner, dtype, marks=[pytest.mark.both] * (min(hidden, inner) < 33 or (i + j + k) % 3 == 0),
        id=f"{hidden}-{inner}-{str(dtype)[6:]}",
    )
    for (i, hidden), (j, inner), (k, dtype) in itertools.product(NUMBERS, NUMBERS, enumerate([F32, F16, BF16]))
    if dtype == F32 or min(hidden, inner) >= 33
]  # fmt: skip


@pytest.mark.more
@OPTIONS
@pytest.mark.parametrize("hidden, inner, dtype", EVERY_SIZE)
def test_every_size(hidden, inner, options, dtype):
    check(*draw(400, hidden, inner, dtype=dtype, **options), **options)


# (E, K): one expert, all of them chosen or nearly, more than there are, most of them idle.
@pytest.mark.both
@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (1, 3), (4, 4), (6, 5), (3, 20), (40, 2)], ids=str)
def test_numbers_of_experts(num_experts, top_k):
    num_tokens = {40: 4, 3: 12}.get(num_experts, 24)
    tensors, indices = draw(num_tokens, 24, 16, num_experts, top_k, sentinels=False)
    if top_k <= num_experts:
        indices = torch.rand(num_tokens, num_experts).topk(top_k).indices
    result = check(tensors, indices)
    idle = torch.ones(num_experts, dtype=torch.bool).index_fill(0, indices.flatten(), False)
    for name in ("dgate_up_proj", "ddown_proj", "dgate_up_bias", "ddown_bias"):
        assert not result[name][idle].any() and result[name][~idle].any(), name


@pytest.mark.both
def test_as_many_experts_as_there_may_be():
    tensors, indices = draw(6, 24, 16, 512, 3)
    indices[0, :2] = torch.tensor([0, 511])
    learnt = {name: tensors.pop(name) for name in ("x", "top_k_weights")}
    op, oracle = (lambda f=f, **learnt: f(**{name: t.to(learnt["x"].dtype) for name, t in tensors.items()}, **learnt) for f in of(indices))
    check_op("moe of 512 experts", op, oracle, learnt)


@pytest.mark.both
@pytest.mark.more
def test_gradients_of_as_many_experts_as_there_may_be():
    check(*draw(6, 24, 16, 512, 3))


@pytest.mark.both
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 70])
def test_numbers_of_tokens(num_tokens):
    result = check(*draw(num_tokens, sentinels=num_tokens > 1))
    assert result["out0"].shape == result["dx"].shape == (num_tokens, 40) and result["dtop_k_weights"].shape == (num_tokens, 2)
    if num_tokens == 0:
        assert not any(grad.any() for grad in result.values())


@pytest.mark.both
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_one_expert_has_them_all(expert):
    tensors, _ = draw(dtype=BF16)
    check(tensors, torch.full((48, 2), expert))


@pytest.mark.both
def test_a_token_names_an_expert_twice():
    """As often as it likes: its weights add up."""
    tensors, indices = draw(24, top_k=4)
    indices = indices[:, :1].expand(24, 4)
    result = check(tensors, indices)
    once = tensors | {"top_k_weights": tensors["top_k_weights"].sum(1, keepdim=True)}
    torch.testing.assert_close(result["out0"], of(indices[:, :1])[0](**once))


@pytest.mark.both
@OPTIONS
def test_experts_that_are_one_are_a_layer(options):
    """Wherever tokens go, with weights that sum to 1: a dense layer, of which there are as many views."""
    tensors, _ = draw(24, num_experts=1, **options)
    weights, indices = fastattn.moe_route(torch.randn(24, 4), 3, renormalize=True)

    def op(**tensors):
        x = tensors.pop("x")
        return fastattn.moe(x, indices, weights, **{name: t.expand(4, *t.shape[1:]) for name, t in tensors.items()}, **options)

    def layer(**tensors):
        ones = torch.ones(24, 1, dtype=tensors["x"].dtype)
        return reference.moe(tensors.pop("x"), torch.zeros(24, 1, dtype=torch.int64), ones, **tensors, **options)

    tensors.pop("top_k_weights")
    check_op("moe of one expert", op, layer, tensors)


@pytest.mark.both
def test_float16_overflows_only_where_the_result_does():
    """The pre-activation is clamped, and dout·down_proj is multiplied by small weights: neither has to fit float16 itself."""
    tensors, indices = draw(dtype=F16, biases=False)
    far = tensors | {"x": 200 * tensors["x"], "gate_up_proj": 3000 * tensors["gate_up_proj"]}
    op, oracle = of(indices, activation="clamped_swiglu")
    out, truth = op(**far), oracle(**{name: t.double() for name, t in far.items()})
    assert out.isfinite().all() and (far["x"].double() @ far["gate_up_proj"].double().mT).abs().max() > 1e5
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=0.05)  # activations of up to 56 are rounded to float16
    dout = [even(48, 40).half()]
    got, wanted = run(op, far, dout), run(oracle, far, dout, torch.float64)
    for name in ("ddown_proj", "dtop_k_weights"):  # what there is of others, gates beyond float16 have none of
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=2e-2, atol=2e-2 * wanted[name].abs().max().item())
    assert all(t.isfinite().all() for t in got.values())
    steep = tensors | {"down_proj": 300 * tensors["down_proj"], "top_k_weights": 1e-4 * tensors["top_k_weights"]}
    check(steep, indices, [1000 * even(48, 40).half()])


# --------------------------------------------------------------------------------------------------------------------
# Ids of nobody.


@pytest.mark.both
def test_ids_of_nobody_add_nothing():
    """Any id from E on. A rank's experts and the other's are all."""
    tensors, indices = draw(24, num_experts=6, sentinels=False)
    whole = check(tensors, indices)
    ranks = []
    for first in (0, 3):
        mine = {name: t if name in ("x", "top_k_weights") else t[first : first + 3] for name, t in tensors.items()}
        local = torch.where((indices >= first) & (indices < first + 3), indices - first, 3)
        ranks.append(check(mine, local))
        far = torch.where(local == 3, torch.tensor([2**40, 2**63 - 1]), local)
        assert torch.equal(of(far)[0](**mine), ranks[-1]["out0"])
    torch.testing.assert_close(ranks[0]["out0"] + ranks[1]["out0"], whole["out0"])


@pytest.mark.both
@OPTIONS
def test_all_are_nobody_s(options):
    tensors, indices = draw(dtype=BF16, **options)
    result = check(tensors, torch.full_like(indices, 3), **options)
    assert len(result) == 7 and not any(t.any() for t in result.values())


@pytest.mark.both
@OPTIONS
def test_what_nobody_has_is_never_looked_at(options):
    """Tokens whose ids are all of nobody, with their upstream gradients; weights of such ids; idle experts."""
    tensors, indices = draw(**options)
    indices[indices == 2] = 7
    indices[:9] = 6
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        tensors[name][2] = NAN
    nobody, dout = indices >= 3, torch.randn(48, 40)
    tensors["top_k_weights"][nobody] = NAN
    tensors["x"][nobody.all(1)], dout[nobody.all(1)] = NAN, NAN
    result = check(tensors, indices, [dout], **options)
    assert not result["out0"][:9].any() and not result["dx"][:9].any() and not result["dtop_k_weights"][nobody].any()
    assert not any(result[f"d{name}"][2].any() for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"))


# --------------------------------------------------------------------------------------------------------------------
# Layouts and dtypes.


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_layout(name):
    """Of everything: rows, weights, matrices whose last two dims lie either way or neither is contiguous, biases, ids. Where all are
    expanded from one there are few distinct values, whose roundings add up: the largest error in half precision is a matter of luck."""
    hidden, inner, options = ((16, 24, {}), (13, 7, GPT_OSS))[len(name) % 2]
    tensors, indices = draw(48, hidden, inner, dtype=F32 if name == "expanded rows" else BF16, **options)
    tensors, indices = {key: INPUT_LAYOUTS[name](t) for key, t in tensors.items()}, INPUT_LAYOUTS[name](indices)
    check(tensors, indices, **options)


SLICES = {
    "every other expert": lambda w: w.repeat_interleave(2, 0)[::2],
    "one for all": lambda w: w[:1].expand_as(w),
    "of wider ones": lambda w: torch.cat([w, w, w], 2)[..., w.shape[2] : 2 * w.shape[2]],
    "of longer ones": lambda w: torch.cat([w, w, w], 1)[:, w.shape[1] : 2 * w.shape[1]],
}


@pytest.mark.both
@OPTIONS
@pytest.mark.parametrize("name", SLICES)
def test_sliced_projections(options, name):
    tensors, indices = draw(16, 16, 8, **options)
    check({key: SLICES[name](t) if t.dim() == 3 else t for key, t in tensors.items()}, indices, **options)


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(name):
    tensors, indices = draw(24, 16, 24, dtype=BF16)
    check(tensors, indices, upstream(of(indices)[0], tensors, UPSTREAM_LAYOUTS[name]))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_weights_in_half_precision(dtype):
    tensors, indices = draw(24)
    tensors["top_k_weights"] = tensors["top_k_weights"].to(dtype)
    op, oracle = of(indices)
    widened = lambda top_k_weights, **tensors: oracle(top_k_weights=top_k_weights.to(tensors["x"].dtype), **tensors)  # noqa: E731
    assert check_op("moe", op, widened, tensors)["dtop_k_weights"].dtype == dtype


@pytest.mark.both
def test_int32_ids_are_int64_ids():
    tensors, indices = draw(12, 16, 8)
    dout = [torch.randn(12, 16)]
    wide, narrow = (run(of(ids)[0], tensors, dout) for ids in (indices, indices.int()))
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


@OPTIONS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_autocast(options, dtype):
    """In bfloat16, as linear layers; gradients are in the parameters' dtypes, and weights stay what they are."""
    tensors, indices = draw(dtype=dtype, **options)
    op, dout = of(indices, **options)[0], torch.randn(48, 40).to(BF16)
    expected = run(op, {name: t if name == "top_k_weights" else t.to(BF16) for name, t in tensors.items()}, [dout])

    def cast(**tensors):
        with torch.autocast("cpu", BF16):
            return op(**tensors)

    got = run(cast, tensors, [dout])
    assert got["out0"].dtype == BF16
    for name, value in got.items():
        assert name == "out0" or value.dtype == tensors[name[1:]].dtype
        assert torch.equal(value, expected[name].to(value.dtype)), name


# --------------------------------------------------------------------------------------------------------------------
# transformers' experts.


def hf_experts(name, num_experts, hidden, inner, top_k):
    """(a module of one layer's experts, options of ours)."""
    pytest.importorskip("transformers", reason="needs transformers")
    from importlib import import_module

    folder, made, options, fields = {
        "mixtral": ("mixtral", "Mixtral", {}, dict(num_local_experts=num_experts, intermediate_size=inner)),
        "qwen3": ("qwen3_moe", "Qwen3Moe", {}, dict(num_experts=num_experts, moe_intermediate_size=inner)),
        "deepseek": ("deepseek_v3", "DeepseekV3", {}, dict(n_routed_experts=num_experts, moe_intermediate_size=inner, n_group=1, topk_group=1)),
        "gpt-oss": ("gpt_oss", "GptOss", GPT_OSS, dict(num_local_experts=num_experts, intermediate_size=inner)),
    }[name]
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(import_module("transformers"), f"{made}Config")(hidden_size=hidden, num_experts_per_tok=top_k, **fields)
    config._experts_implementation = "eager"
    experts = next(getattr(module, f"{made}{suffix}") for suffix in ("Experts", "NaiveMoe") if hasattr(module, f"{made}{suffix}"))
    return experts(config), options


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "deepseek", "gpt-oss"])
def test_transformers_experts(name):
    experts, options = hf_experts(name, 5, 40, 32, 2)
    tensors, indices = draw(inner=32, biases=name == "gpt-oss", transposed=name == "gpt-oss", sentinels=False)
    for key, parameter in {"gate_up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias"}.items():
        assert hasattr(experts, parameter) == (key in tensors)

    def theirs(x, top_k_weights, **tensors):
        parameters = {key.replace("bias", "proj_bias"): t for key, t in tensors.items()}
        return torch.func.functional_call(experts, parameters, (x, indices, top_k_weights))

    check_op(f"moe {name}", of(indices, **options)[0], theirs, tensors)


# --------------------------------------------------------------------------------------------------------------------
# Properties.


@pytest.mark.both
def test_permuted_tokens_are_permuted_outputs(launches):
    """Bit for bit in the kernels, where a row's sums do not depend on where in a tile it lies; torch's matrix products on the CPU may."""
    tensors, indices = draw()
    order, douts = torch.randperm(48), [torch.randn(48, 40)]
    permuted = tensors | {name: tensors[name][order] for name in ("x", "top_k_weights")}
    whole, got = run(of(indices)[0], tensors, douts), run(of(indices[order])[0], permuted, [douts[0][order]])
    for name in ("out0", "dx", "dtop_k_weights"):
        if launches is None:
            torch.testing.assert_close(got[name], whole[name][order])
        else:
            assert torch.equal(got[name], whole[name][order]), name
    check(permuted, indices[order], [douts[0][order]])


@pytest.mark.both
@OPTIONS
def test_two_runs_are_one(options):
    tensors, indices = draw(24, dtype=BF16, **options)
    dout = [torch.randn(24, 40).to(BF16)]
    first, second = (run(of(indices, **options)[0], tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_subsets(subsets, **options):
    """Gradients of some are those of all, bit for bit, and no others come."""
    tensors, indices = draw(12, 16, 8, **options)
    op, dout = of(indices, **options)[0], torch.randn(12, 16)
    whole = run(op, tensors, [dout])
    for wanted in subsets:
        leaves = {name: t.clone().requires_grad_(want) for (name, t), want in zip(tensors.items(), wanted)}
        out = op(**leaves)
        assert torch.equal(out, whole["out0"]) and out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for (name, leaf), want in zip(leaves.items(), wanted):
            assert torch.equal(leaf.grad, whole[f"d{name}"]) if want else leaf.grad is None, (name, wanted)


@OPTIONS
def test_each_subset_of_gradients(options):
    check_subsets(itertools.product([False, True], repeat=6), **options)


@pytest.mark.interpret
@pytest.mark.more
def test_gradients_alone_and_all_but_one():
    check_subsets([[i == j for i in range(6)] for j in range(6)])
    check_subsets([[i != j for i in range(6)] for j in range(6)], **GPT_OSS)


@pytest.mark.both
def test_pure():
    for options in ({}, GPT_OSS):
        tensors, indices = draw(12, 16, 8, **options)
        before = indices.clone()
        check_pure(of(indices, **options)[0], tensors)
        assert torch.equal(indices, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    tensors, indices = draw(6, 8, 5, 3, biases=False)
    gate_up, down = tensors["gate_up_proj"], tensors["down_proj"]
    batch = torch.randn(3, 6, 8), torch.randint(4, (3, 6, 2)), torch.rand(3, 6, 2)

    def op(x, ids, weights):
        return fastattn.moe(x, ids, weights, gate_up, down)

    assert torch.equal(torch.func.vmap(op)(*batch), torch.stack([op(*one) for one in zip(*batch)]))
    same = torch.func.vmap(op, (0, None, 0))(batch[0], indices, batch[2])
    assert torch.equal(same, torch.stack([op(x, indices, weights) for x, weights in zip(batch[0], batch[2])]))
    grad = torch.func.grad(lambda x, ids, weights: op(x, ids, weights).square().sum(), (0, 2))
    for got, expected in zip(torch.func.vmap(grad)(*batch), zip(*(grad(*one) for one in zip(*batch)))):
        assert torch.equal(got, torch.stack(expected))


# --------------------------------------------------------------------------------------------------------------------
# What it costs.


@pytest.mark.both
@OPTIONS
def test_memory_that_is_kept(options):
    """x, the weights, the pre-activation (T·K, 2·I), the plan and the parameters: of rows of H as many as there are tokens, not T·K."""
    num_tokens, hidden, inner, top_k = 50, 64, 16, 4
    tensors, indices = draw(num_tokens, hidden, inner, top_k=top_k, dtype=BF16, **options)
    leaves, kept = {name: t.requires_grad_() for name, t in tensors.items()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        of(indices, **options)[0](**leaves)
    given = {t.data_ptr() for t in leaves.values()}
    made = [t for pointer, t in kept.items() if pointer not in given]
    slots = num_tokens * top_k
    assert len(kept) - len(made) == 6
    assert sorted(tuple(t.shape) for t in made) == [(3,), (slots,), (slots,), (slots, 2 * inner)]
    assert sum(t.untyped_storage().nbytes() for t in made) == slots * 2 * inner * 2 + 2 * slots * 8 + 3 * 4


WANTED = [("x",), ("top_k_weights",), ("gate_up_proj",), ("down_proj",), ("gate_up_bias",), ("down_bias",), ("x", "top_k_weights")]


@pytest.mark.both
@OPTIONS
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_some_gradients_are_those_of_all(options, wanted):
    tensors, indices = draw(24, 16, 24, dtype=BF16, **options)
    op, dout = of(indices, **options)[0], even(24, 16).to(BF16)
    whole = run(op, tensors, [dout])
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    for name, grad in zip(wanted, torch.autograd.grad(op(**leaves), [leaves[name] for name in wanted], dout), strict=True):
        assert torch.equal(grad, whole[f"d{name}"]), name


class Calls(TorchDispatchMode):
    """The arguments of each call of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator.default, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.both
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_nothing_is_kept(how):
    tensors, indices = draw()
    op = of(indices)[0]
    for t in tensors.values():
        t.requires_grad_(how != "frozen")
    with Calls(torch.ops.fastattn.moe_fwd) as recorder:
        whole = op(**{name: t.detach().requires_grad_() for name, t in tensors.items()})
        with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)():
            out = op(**tensors)
    assert [call[-1] for call in recorder.calls] == [True, False]
    assert not out.requires_grad and torch.equal(out, whole)
    _, pre = torch.ops.fastattn.moe_fwd(*(t.detach() if isinstance(t, torch.Tensor) else t for t in recorder.calls[1]))
    assert pre.shape == (0, 66)


def test_flops():
    """6·T·K·H·I, thrice that with a backward; frozen projections and a fixed x save theirs."""
    tensors, indices = draw(24, 40, 33, top_k=2)
    product = 2 * 24 * 2 * 40 * 33

    def flops(*fixed):
        leaves = {name: t.detach().requires_grad_(name not in fixed) for name, t in tensors.items()}
        with FlopCounterMode(display=False) as counter:
            out = of(indices)[0](**leaves)
            if out.requires_grad:
                out.sum().backward()
        return counter.get_total_flops() // product

    assert flops(*tensors) == 3
    assert flops() == 9
    assert flops("x") == 7 and flops("gate_up_proj") == 7 and flops("down_proj") == 8
    assert flops(*tensors.keys() - {"x"}) == 6


# --------------------------------------------------------------------------------------------------------------------
# Below the checks.


def arguments(tensors, order, inverse, offsets):
    """The launchers' arguments from x on."""
    given = [tensors.get(name) for name in ("top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")]
    return tensors["x"], order, inverse, offsets, *given


def garbled(numbers, num_rows):
    """Some of them numbers of no row: just outside, and far."""
    worst = torch.tensor([-1, num_rows, num_rows + 1, 2**31, 2**32, -(2**31), 2**62, 2**63 - 1, -(2**63)])
    numbers = numbers.clone()
    numbers[torch.randperm(len(numbers))[: len(worst)]] = worst
    return numbers


@pytest.mark.interpret
@OPTIONS
@pytest.mark.parametrize("which", [("order",), ("inverse",), ("order", "inverse")], ids="+".join)
def test_hostile_row_numbers(which, options):
    """A row of no token is that of a token of zeros, and a slot of no row adds nothing. Backwards nothing that nobody wrote is read:
    empties are NaN here."""
    from fastattn.kernels.moe import moe_bwd, moe_fwd

    transposed = options.get("transposed", False)
    tensors, indices = draw(30, transposed=transposed)
    order, inverse, offsets = fastattn.moe_dispatch(indices, 3)
    bad_order, bad_inverse = (garbled(t, 60) if name in which else t for name, t in (("order", order), ("inverse", inverse)))
    given = [options.get("activation", "swiglu"), options.get("layout", "concatenated"), transposed]
    out, pre = moe_fwd(*arguments(tensors, bad_order, bad_inverse, offsets), *given, True)

    ids = indices.flatten()[order].clone()
    exists = (bad_order >= 0) & (bad_order < 60)
    rows = torch.where(exists[:, None], tensors["x"][bad_order.clamp(0, 59) // 2], 0.0)
    y = reference.moe(**tensors | {"x": rows, "top_k_weights": torch.ones(60, 1)}, top_k_index=ids[:, None], **options)
    there = (bad_inverse >= 0) & (bad_inverse < offsets[-1])
    y = torch.where(there[:, None], y[bad_inverse.clamp(0, 59)], 0.0).view(30, 2, 40)
    torch.testing.assert_close(out, (tensors["top_k_weights"][..., None] * y).sum(1))
    assert pre[: offsets[-1]].isfinite().all()
    for grad in moe_bwd(torch.randn(30, 40), *arguments(tensors, bad_order, bad_inverse, offsets), pre, *given, [True] * 6):
        assert grad.isfinite().all()


@pytest.mark.interpret
@OPTIONS
@pytest.mark.parametrize(
    "ends",
    [(9, 4, 20), (-(2**31), 30, -1), (-1, -1, -1), (3, 61, 90), (5, 2**31 - 1, 2**31 - 1), (-(2**31), 2**31 - 1, 0)],
    ids=["decreasing", "negative", "all negative", "past the end", "far past the end", "lowest and highest"],
)  # fmt: skip
def test_hostile_ends(ends, options):
    """Each is raised to the one before it and cut at the last row. A slot is added if its row lies before the last end as it was given."""
    from fastattn.kernels.moe import moe_bwd, moe_fwd

    transposed = options.get("transposed", False)
    tensors, indices = draw(30, transposed=transposed)
    order, inverse, _ = fastattn.moe_dispatch(indices, 3)
    offsets = torch.tensor(ends, dtype=torch.int32)
    given = [options.get("activation", "swiglu"), options.get("layout", "concatenated"), transposed]
    out, pre = moe_fwd(*arguments(tensors, order, inverse, offsets), *given, True)

    ordered = offsets.long().cummax(0).values.clamp(0, 60)
    ids = (torch.arange(60)[:, None] >= ordered).sum(1, keepdim=True)
    y = reference.moe(**tensors | {"x": tensors["x"][order // 2], "top_k_weights": torch.ones(60, 1)}, top_k_index=ids, **options)
    y = torch.where((inverse < offsets[-1])[:, None], y[inverse], 0.0).view(30, 2, 40)
    torch.testing.assert_close(out, (tensors["top_k_weights"][..., None] * y).sum(1))
    for grad in moe_bwd(torch.randn(30, 40), *arguments(tensors, order, inverse, offsets), pre, *given, [True] * 6):
        assert grad.isfinite().all()


@pytest.mark.interpret
def test_negative_ids_are_nobody_s_below_the_check(monkeypatch):
    """As on CUDA, where ids are not looked at."""
    from fastattn.ops import moe_routing

    monkeypatch.setattr(moe_routing, "checks_values", lambda tensor: False)
    tensors, indices = draw()
    hostile = torch.where(indices == 3, torch.tensor([-1, -(2**63)]), indices)
    assert torch.equal(of(hostile)[0](**tensors), of(indices)[0](**tensors))


@pytest.mark.interpret
def test_rows_past_2_31_elements():
    stride = 2**31 + 8
    storage = torch.UntypedStorage(2 * (stride + 32))  # reserved, not filled
    tensors, indices = draw(2, 16, 1, 2, dtype=F16, biases=False, sentinels=False)
    expected = of(indices)[0](**tensors)
    for name, t in tensors.items():
        if name == "top_k_weights":
            continue
        wide = torch.empty(0, dtype=F16).set_(storage, 0, t.shape, (stride, *t.stride()[1:]))
        wide.copy_(t)
        assert torch.equal(of(indices)[0](**tensors | {name: wide}), expected), name


@pytest.mark.interpret
@OPTIONS
def test_program_order_does_not_matter(options):
    from fastattn.testing.checker import assert_order_independent

    tensors, indices = draw(40, 40, 70, **options)
    dout = torch.randn(40, 40)
    assert_order_independent(lambda: tuple(run(of(indices, **options)[0], tensors, [dout]).values()))


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X, UP, DOWN = torch.zeros(5, 16), torch.zeros(4, 12, 16), torch.zeros(4, 16, 6)
IDS, WEIGHTS = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, r"x must be a torch.Tensor, got NoneType"),
        (dict(x=X.double()), TypeError, r"x must be float16, bfloat16 or float32, got torch.float64"),
        (dict(x=X[0]), ValueError, r"x must have shape \(T, H\) with H of 1 or more, got \(16,\)"),
        (dict(x=X[None]), ValueError, r"x must have shape \(T, H\) with H of 1 or more, got \(1, 5, 16\)"),
        (dict(x=X[:, :0]), ValueError, r"x must have shape \(T, H\) with H of 1 or more, got \(5, 0\)"),
        (dict(activation="relu"), ValueError, r"activation must be one of 'swiglu', 'geglu', 'clamped_swiglu', got 'relu'"),
        (dict(activation=None), TypeError, r"activation must be a str, got NoneType"),
        (dict(transposed="no"), TypeError, r"transposed must be a bool, got str"),
        (dict(x=X.to_sparse()), TypeError, r"x must be a dense tensor, got torch.sparse_coo"),
        (dict(x=torch.nested.nested_tensor([X, X])), TypeError, r"x must be a dense tensor, got a nested one"),
        (dict(layout="packed"), ValueError, r"layout must be one of 'concatenated', 'interleaved', got 'packed'"),
        (dict(gate_up_proj=None), TypeError, r"gate_up_proj must be a torch.Tensor, got NoneType"),
        (dict(gate_up_proj=UP.half()), TypeError, r"gate_up_proj must have x's dtype torch.float32, got torch.float16"),
        (dict(gate_up_proj=UP.to("meta")), ValueError, r"gate_up_proj must be on x's device cpu, got meta"),
        (dict(gate_up_proj=UP[0]), ValueError, r"gate_up_proj must have shape \(E, 2·I, H\), none of it 0, got \(12, 16\)"),
        (dict(gate_up_proj=UP[:, :0]), ValueError, r"gate_up_proj must have shape \(E, 2·I, H\), none of it 0, got \(4, 0, 16\)"),
        (dict(gate_up_proj=UP[:0]), ValueError, r"gate_up_proj must have shape \(E, 2·I, H\), none of it 0, got \(0, 12, 16\)"),
        (dict(gate_up_proj=UP[:, :11]), ValueError, r"gate_up_proj must have shape \(E, 2·I, H\) with x's H = 16, got \(4, 11, 16\)"),
        (dict(gate_up_proj=UP[..., 1:]), ValueError, r"gate_up_proj must have shape \(E, 2·I, H\) with x's H = 16, got \(4, 12, 15\)"),
        (dict(transposed=True), ValueError, r"gate_up_proj must have shape \(E, H, 2·I\) with x's H = 16, got \(4, 12, 16\)"),
        (dict(gate_up_proj=UP[:1].expand(513, 12, 16)), ValueError, r"gate_up_proj must have at most 512 experts, got \(513, 12, 16\)"),
        (dict(down_proj=1), TypeError, r"down_proj must be a torch.Tensor, got int"),
        (dict(down_proj=DOWN.half()), TypeError, r"down_proj must have x's dtype torch.float32, got torch.float16"),
        (dict(down_proj=DOWN.to("meta")), ValueError, r"down_proj must be on x's device cpu, got meta"),
        (dict(down_proj=DOWN[..., :0]), ValueError, r"down_proj must have shape \(E, H, I\), none of it 0, got \(4, 16, 0\)"),
        (dict(down_proj=DOWN[..., 1:]), ValueError, r"down_proj must have shape \(E, H, I\) = \(4, 16, 6\) to match gate_up_proj, got \(4, 16, 5\)"),
        (dict(down_proj=DOWN[1:]), ValueError, r"down_proj must have shape \(E, H, I\) = \(4, 16, 6\) to match gate_up_proj, got \(3, 16, 6\)"),
        (dict(gate_up_proj=UP.transpose(1, 2), transposed=True), ValueError, r"down_proj must have shape \(E, I, H\) = \(4, 6, 16\) to match gate_up_proj, got \(4, 16, 6\)"),
        (dict(gate_up_bias=1.0), TypeError, r"gate_up_bias must be a torch.Tensor, got float"),
        (dict(gate_up_bias=UP[..., 0].half()), TypeError, r"gate_up_bias must have x's dtype torch.float32, got torch.float16"),
        (dict(gate_up_bias=UP[..., 0].to("meta")), ValueError, r"gate_up_bias must be on x's device cpu, got meta"),
        (dict(gate_up_bias=DOWN[..., 0]), ValueError, r"gate_up_bias must have shape \(E, 2·I\) = \(4, 12\), got \(4, 16\)"),
        (dict(down_bias=1.0), TypeError, r"down_bias must be a torch.Tensor, got float"),
        (dict(down_bias=DOWN[..., 0].half()), TypeError, r"down_bias must have x's dtype torch.float32, got torch.float16"),
        (dict(down_bias=DOWN[..., 0].to("meta")), ValueError, r"down_bias must be on x's device cpu, got meta"),
        (dict(down_bias=UP[..., 0]), ValueError, r"down_bias must have shape \(E, H\) = \(4, 16\), got \(4, 12\)"),
        (dict(top_k_index=[[0]]), TypeError, r"top_k_index must be a torch.Tensor, got list"),
        (dict(top_k_index=IDS.to("meta")), ValueError, r"top_k_index must be on x's device cpu, got meta"),
        (dict(top_k_index=IDS[0]), ValueError, r"top_k_index must have shape \(T, K\) with x's T = 5, got \(2,\)"),
        (dict(top_k_index=IDS[1:]), ValueError, r"top_k_index must have shape \(T, K\) with x's T = 5, got \(4, 2\)"),
        (dict(top_k_index=IDS[:, :0], top_k_weights=WEIGHTS[:, :0]), ValueError, r"top_k_index must have shape \(T, K\) with x's T = 5, got \(5, 0\)"),
        (dict(top_k_weights=None), TypeError, r"top_k_weights must be a torch.Tensor, got NoneType"),
        (dict(top_k_weights=WEIGHTS.double()), TypeError, r"top_k_weights must be float16, bfloat16 or float32, got torch.float64"),
        (dict(top_k_weights=WEIGHTS.to("meta")), ValueError, r"top_k_weights must be on x's device cpu, got meta"),
        (dict(top_k_weights=WEIGHTS[1:]), ValueError, r"top_k_weights must have shape \(T, K\) with x's T = 5, got \(4, 2\)"),
        (dict(top_k_weights=WEIGHTS[:, :1]), ValueError, r"top_k_weights must have top_k_index's shape \(5, 2\), got \(5, 1\)"),
        (dict(top_k_index=IDS.float()), TypeError, r"top_k_index must be int32 or int64, got torch.float32"),
        (dict(top_k_index=IDS - 3), ValueError, r"indices must hold ids of 0 or more \(those of num_experts or more are nobody's\), got -3"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=("moe_dispatch: " if message.startswith("indices") else "moe: ") + message):
        fastattn.moe(**dict(x=X, top_k_index=IDS, top_k_weights=WEIGHTS, gate_up_proj=UP, down_proj=DOWN) | change)


@pytest.mark.both
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(order=torch.tensor([0, 1, 2, 10])), r"plan.order must hold slots in \[0, T·K\) = \[0, 4\), got 10"),
        (dict(inverse=torch.tensor([0, -1, 2, 3])), r"plan.inverse must hold slots in \[0, T·K\) = \[0, 4\), got -1"),
        (dict(inverse=torch.tensor([1, 0, 2, 3])), r"plan.inverse must hold the row 0 of slot 0, got 1"),
        (dict(order=torch.tensor([0, 0, 2, 3])), r"plan.inverse must hold the row 1 of slot 0, got 0"),
        (dict(offsets=torch.tensor([3, 2, 4], dtype=torch.int32)), r"plan.offsets must not decrease, from 0 to at most 4, got 3 then 2 at index 1"),
        (dict(offsets=torch.tensor([-1, 2, 4], dtype=torch.int32)), r"plan.offsets must not decrease, .* got 0 then -1 at index 0"),
        (dict(offsets=torch.tensor([1, 2, 5], dtype=torch.int32)), r"plan.offsets must not decrease, .* got 5 then 4 at index 3"),
        (dict(ids=torch.tensor([[0, 1], [-2, 2]])), r"top_k_index must hold ids of 0 or more .*, got -2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_plan_that_is_none(change, message):
    ids = torch.tensor([[0, 1], [1, 2]])
    plan = fastattn.moe_dispatch(ids, 3)._replace(**{name: t for name, t in change.items() if name != "ids"})
    with pytest.raises(ValueError, match=f"^moe: {message}"):
        fastattn.moe(torch.randn(2, 8), change.get("ids", ids), torch.rand(2, 2), torch.randn(3, 12, 8), torch.randn(3, 8, 6), plan=plan)


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@OPTIONS
def test_operators(options):
    transposed = options.get("transposed", False)
    tensors, indices = draw(4, 8, 4, 2, dtype=BF16, biases=transposed, transposed=transposed, sentinels=False)
    given = arguments(tensors, *fastattn.moe_dispatch(indices, 2))
    options = [options.get("activation", "swiglu"), options.get("layout", "concatenated"), transposed]
    for keep in (False, True):
        check_operator(torch.ops.fastattn.moe_fwd, *given, *options, keep)
    _, pre = torch.ops.fastattn.moe_fwd(*given, *options, True)
    dout = torch.randn(4, 1).to(BF16).expand(4, 8)
    check_operator(torch.ops.fastattn.moe_bwd, dout, *given, pre, *options, [True] * 6)


@pytest.mark.both
def test_gradients_that_are_not_wanted_are_empty():
    """In the real ones as in the fake ones."""
    from op_contract import layout, outputs
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, indices = draw(12, 16, 8)
    given = arguments(tensors, *fastattn.moe_dispatch(indices, 3))
    options = "swiglu", "concatenated", False
    _, pre = torch.ops.fastattn.moe_fwd(*given, *options, True)
    for i in range(6):
        wanted = [i != j for j in range(6)]
        real = outputs(torch.ops.fastattn.moe_bwd(torch.randn(12, 16), *given, pre, *options, wanted))
        with FakeTensorMode() as mode:
            dout, *fakes = (mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (torch.randn(12, 16), *given, pre))
            fake = outputs(torch.ops.fastattn.moe_bwd(dout, *fakes, *options, wanted))
        assert [layout(t) for t in real] == [layout(t) for t in fake] and real[i].shape == (0,)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_what_is_not_wanted_is_neither_computed_nor_written(as_on_cuda, wanted):
    """Each launch of a backward, and the outputs of the first."""
    names = ("x", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    flags = [name in wanted for name in names]
    launches = launched_on((9, 0), lambda: as_on_cuda._moe_bwd(*launch_forward(as_on_cuda, 100), flags))[len(FORWARD) :]
    through = {"x", "gate_up_proj", "gate_up_bias"} & set(wanted)
    expected = {
        "_moe_down_bwd_kernel": bool(through or {"top_k_weights", "down_proj"} & set(wanted)), "_moe_bias_dot_kernel": flags[1],
        "_grouped_mm_weight_kernel": flags[2] + flags[3], "_grouped_sum_kernel": flags[4] + flags[5], "_grouped_mm_kernel": flags[0],
        "_moe_combine_fwd_kernel": flags[0],
    }  # fmt: skip
    assert {name: sum(launch.name == name for launch in launches) for name in expected} == {k: int(v) for k, v in expected.items()}
    for launch in launches[:1] if expected["_moe_down_bwd_kernel"] else []:
        written = [launch.args[name] is not None for name in ("dpre_ptr", "out_ptr", "dots_ptr")]
        assert written == [bool(through), flags[3], flags[1]]


@OPTIONS
def test_transforms(options):
    transposed = options.get("transposed", False)
    tensors, indices = draw(4, 8, 5, 2, biases=transposed, transposed=transposed)
    check_transforms("moe", of(indices, **options)[0], tensors)


@OPTIONS
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic, options):
    tensors, indices = draw(**options)
    check_compiled(of(indices, **options)[0], tensors, dynamic)


def test_a_compiled_first_layer():
    """x wants no gradient, biases are frozen."""
    tensors, indices = draw()
    fixed = {name: tensors.pop(name) for name in ("x", "gate_up_bias", "down_bias")}
    check_compiled(lambda **tensors: fastattn.moe(top_k_index=indices, **fixed, **tensors), tensors)


def test_a_compiled_layer_with_its_router_is_eager():
    tensors, _ = draw(12)
    del tensors["top_k_weights"]

    def layer(logits, **tensors):
        weights, indices = fastattn.moe_route(logits, 2, renormalize=True)
        return fastattn.moe(top_k_index=indices, top_k_weights=weights, **tensors)

    check_compiled(layer, tensors | {"logits": torch.randn(12, 3)}, backend="aot_eager")


def test_numbers_of_tokens_are_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fastattn.moe, fullgraph=True, backend=counter)
    for num_tokens in (5, 9, 30):
        tensors, indices = draw(num_tokens)
        for t in (tensors["x"], tensors["top_k_weights"], indices):
            torch._dynamo.mark_dynamic(t, 0)
        assert torch.equal(compiled(top_k_index=indices, **tensors), fastattn.moe(top_k_index=indices, **tensors))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "moe")


def launch_forward(ops, num_tokens, top_k=2, num_experts=8, hidden=256, inner=128, dtype=BF16, **options):
    """Calls moe_fwd's implementation on tensors of so many tokens; gives what the backward's takes."""
    tensors, indices = draw(1, hidden, inner, num_experts, top_k, dtype, **options)
    tensors |= {"x": torch.zeros(num_tokens, hidden, dtype=dtype), "top_k_weights": torch.zeros(num_tokens, top_k)}
    order, offsets = torch.zeros(num_tokens * top_k, dtype=torch.int64), torch.zeros(num_experts, dtype=torch.int32)
    given = arguments(tensors, order, order.clone(), offsets)
    options = [options.get("activation", "swiglu"), options.get("layout", "concatenated"), options.get("transposed", False)]
    out, pre = ops._moe_fwd(*given, *options, True)
    return out, *given, pre, *options


def launch_both(ops, num_tokens, **options):
    return ops._moe_bwd(*launch_forward(ops, num_tokens, **options), [True] * 6)


# The two products and the sum; back through both, the first with the activation's backward in it.
FORWARD = ["_moe_up_kernel", "_grouped_mm_kernel", "_moe_combine_fwd_kernel"]
BACKWARD = [
    "_moe_down_bwd_kernel", "_moe_bias_dot_kernel", "_grouped_mm_weight_kernel", "_grouped_sum_kernel", "_grouped_sum_kernel",
    "_grouped_mm_weight_kernel", "_grouped_mm_kernel", "_moe_combine_fwd_kernel",
]  # fmt: skip


# A part and one of both, for the compiler takes seconds for each; the others at length.
@pytest.mark.parametrize(
    "capability, options",
    [
        pytest.param(capability, options, marks=[pytest.mark.more] * at_length, id=f"{capability}-{name}")
        for capability, often in {(8, 0): "gpt-oss", (9, 0): "mixtral", (10, 0): "gpt-oss", (12, 0): "mixtral"}.items()
        for name, options, at_length in (("mixtral", {}, often != "mixtral"), ("gpt-oss", GPT_OSS, often != "gpt-oss"))
    ],
)
def test_cuda_implementation_never_syncs(as_on_cuda, capability, options):
    launches = launched_on(capability, lambda: launch_both(as_on_cuda, 1000, **options))
    assert [launch.name for launch in launches] == FORWARD + BACKWARD
    assert all(max(launch.grid) < 2**31 for launch in launches)


@pytest.mark.parametrize("num_tokens", [pytest.param(1, marks=pytest.mark.more), 100])
def test_cuda_implementation_in_single_precision_never_syncs(as_on_cuda, num_tokens):
    assert launched_on((9, 0), lambda: launch_both(as_on_cuda, num_tokens, dtype=F32))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_numbers_of_tokens_choose_at_most_two_variants(as_on_cuda, direction):
    """A few rows an expert and many; backward, of one product or two: matrices' gradients are of either side gathered."""
    from fastattn.testing.stub_driver import stub_driver

    with stub_driver() as driver:
        given = [launch_forward(as_on_cuda, num_tokens) for num_tokens in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 100, 128, 129, 200)]
        if direction == "backward":
            driver.forget()
            driver.launches.clear()
            for args in given:
                as_on_cuda._moe_bwd(*args, [True] * 6)
        kernels = {launch.kernel for launch in driver.launches}
        assert kernels and max(len(driver.variants(kernel)) for kernel in kernels) <= 2


def test_nothing_to_do_launches_nothing_that_reads(as_on_cuda):
    some, none = (launched_on((9, 0), lambda n=n: launch_both(as_on_cuda, n)) for n in (1, 0))
    assert len(none) < len(some)


@pytest.mark.parametrize("launcher", ["forward", "backward", "bias"])
def test_more_slots_than_32_bits_count_are_refused(launcher):
    """By each launcher, before anything of that many rows is looked at: these have no memory."""
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels.grouped_mm import MOST_ROWS
    from fastattn.kernels.moe import moe_bwd, moe_fwd
    from fastattn.testing.stub_driver import stub_driver

    slots = MOST_ROWS + 1
    made = lambda *shape, dtype=F16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    x, order, offsets, weights = made(slots, 16), made(slots, dtype=torch.int64), made(2, dtype=torch.int32), made(slots, 1, dtype=F32)
    given = x, order, order, offsets, weights, made(2, 8, 16), made(2, 16, 4), None, made(2, 16)
    options = "swiglu", "concatenated", False
    with stub_driver(), pytest.raises(ValueError, match=f"moe: the input must have at most {slots - 1} rows, got {slots}"):
        if launcher == "forward":
            moe_fwd(*given, *options, True)
        else:
            moe_bwd(x, *given, made(slots, 8), *options, [launcher == "backward"] * 5 + [True])


@pytest.mark.parametrize("num_tokens", [1, 100, 50_000])
def test_programs_stay(as_on_cuda, num_tokens):
    """As many as there are tiles, at most as many as have room together."""
    from fastattn.kernels.grouped_mm import config_of
    from fastattn.testing.stub_driver import stub_driver

    with stub_driver() as driver:
        _, x, *_ = launch_forward(as_on_cuda, num_tokens)
        slots = 2 * num_tokens
        for launch, kernel, columns, inner in zip(driver.launches, ("gated", "product"), (256, 256), (256, 128)):
            config = config_of(kernel, x, slots, 8, inner, True)
            tiles = (min(8, slots) + slots // config.BLOCK_M) * -(-columns // config.BLOCK_N)
            assert launch.grid == (min(tiles, 132 * config.resident), 1, 1), kernel
