"""Routing to experts and back: the kernels in the interpreter and the CPU path against float64, transformers' routers, the operators."""

from __future__ import annotations

import pytest
import torch
from op_contract import (
    BF16,
    DTYPES,
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
    runs_as_on_cuda,
    upstream,
)

import fastattn
from fastattn import reference
from fastattn.ops.moe_routing import MoEPlan

INF, NAN = float("inf"), float("nan")

MIXTRAL = dict(renormalize=True)
QWEN3 = dict()
GPT_OSS = dict(order="topk_then_score")
LLAMA4 = dict(score="sigmoid", order="topk_then_score")
DEEPSEEK = dict(score="sigmoid", bias=True, num_groups=4, top_k_groups=2, renormalize=True, scaling_factor=2.5)
ROUTERS = {"mixtral": MIXTRAL, "qwen3": QWEN3, "gpt-oss": GPT_OSS, "llama4": LLAMA4, "deepseek": DEEPSEEK}


def options_for(num_experts, **options):
    """bias=True is a random one; a bias of tensor is what it is."""
    if options.get("bias") is True:
        options["bias"] = 0.2 * torch.randn(num_experts)
    return options


def weights_of(top_k, options):
    """(op, oracle): the weights alone, as functions of the logits."""
    return (lambda logits: fastattn.moe_route(logits, top_k, **options)[0]), (lambda logits: reference.moe_route(logits, top_k, **options)[0])


def check_route(logits, top_k, douts=None, **options):
    """Choice, weights and gradient."""
    options = options_for(logits.shape[1], **options)
    result = check_op(f"moe_route E={logits.shape[1]} K={top_k} {options}", *weights_of(top_k, options), {"logits": logits}, douts)
    weights, indices = fastattn.moe_route(logits, top_k, **options)
    assert weights.dtype == F32 and indices.dtype == torch.int64 and indices.is_contiguous()
    assert torch.equal(indices, reference.moe_route(logits.double(), top_k, **options)[1])
    return result["out0"], indices


def plan_for(num_tokens, num_experts, top_k, sentinels=True):
    """(indices, plan) of random ids, some of nobody, some named twice by one token."""
    indices = torch.randint(num_experts + 2 * sentinels, (num_tokens, top_k))
    return indices, fastattn.moe_dispatch(indices, num_experts)


def moved(num_tokens, num_experts, top_k, num_cols, dtype=F32, sentinels=True):
    """(plan, tensors for combine)."""
    _, plan = plan_for(num_tokens, num_experts, top_k, sentinels)
    return plan, {"y": torch.randn(num_tokens * top_k, num_cols).to(dtype), "weights": torch.rand(num_tokens, top_k)}


def combine(plan):
    """(op, oracle) as functions of y and weights."""
    return (lambda y, weights: fastattn.moe_combine(y, plan, weights)), (lambda y, weights: reference.moe_combine(y, plan, weights))


def gather(plan):
    return (lambda x: fastattn.moe_gather(x, plan)), (lambda x: reference.moe_gather(x, plan))


def sorted_by_hand(indices, num_experts):
    """The plan, slot by slot."""
    rows = [[] for _ in range(num_experts + 1)]
    for slot, expert in enumerate(indices.flatten().tolist()):
        rows[expert if 0 <= expert < num_experts else num_experts].append(slot)
    order = torch.tensor(sum(rows, []), dtype=torch.int64)
    return order, order.argsort(), torch.tensor([len(r) for r in rows[:-1]]).cumsum(0).int()


def check_plan(plan, indices, num_experts):
    for name, got, expected in zip(MoEPlan._fields, plan, sorted_by_hand(indices, num_experts)):
        assert torch.equal(got, expected) and got.dtype == expected.dtype, name


# --------------------------------------------------------------------------------------------------------------------
# Routing: values and gradients.


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("router", ROUTERS)
def test_routes(router, dtype):
    check_route(torch.randn(9, 32).to(dtype), 4, **ROUTERS[router])


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("router", ROUTERS)
def test_many_tokens(router):
    check_route(torch.randn(700, 64).to(BF16), 6, **ROUTERS[router])


# One expert, all of them chosen, odd numbers, a row of a warp and more, groups of one and groups that no power of two pads alone.
SIZES = [(1, 1, {}), (3, 3, {}), (7, 2, {}), (128, 8, MIXTRAL), (513 - 1, 8, {}), (100, 100, GPT_OSS), (60, 4, LLAMA4)]
GROUPED = [(160, 6, 8, 3), (9, 3, 3, 1), (6, 3, 6, 4), (256, 8, 8, 4), (30, 12, 5, 2), (8, 2, 1, 1), (12, 4, 4, 4)]


@pytest.mark.both
@pytest.mark.parametrize("num_experts, top_k, options", SIZES, ids=str)
def test_numbers_of_experts(num_experts, top_k, options):
    check_route(torch.randn(5, num_experts), top_k, **options)


@pytest.mark.both
@pytest.mark.parametrize("bias", [None, True], ids=["max", "sum of two"])
@pytest.mark.parametrize("num_experts, top_k, num_groups, top_k_groups", GROUPED, ids=str)
def test_groups(num_experts, top_k, num_groups, top_k_groups, bias):
    logits = torch.randn(6, num_experts)
    _, indices = check_route(logits, top_k, bias=bias, num_groups=num_groups, top_k_groups=top_k_groups)
    groups = indices // (num_experts // num_groups)
    assert all(len(set(row)) <= top_k_groups for row in groups.tolist())


@pytest.mark.both
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["score_then_topk", "topk_then_score"])
@pytest.mark.parametrize("bias", [None, True], ids=["plain", "bias"])
@pytest.mark.parametrize("renormalize", [False, True], ids=["as it is", "renormalized"])
def test_options(score, order, bias, renormalize):
    check_route(torch.randn(7, 20), 3, score=score, order=order, bias=bias, renormalize=renormalize, scaling_factor=0.7)


@pytest.mark.both
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_numbers_of_tokens(num_tokens):
    for options in (MIXTRAL, DEEPSEEK):
        weights, indices = check_route(torch.randn(num_tokens, 64), 4, **options)
        assert weights.shape == indices.shape == (num_tokens, 4)


@pytest.mark.both
def test_chosen_by_the_biased_score_and_weighed_by_the_unbiased():
    logits, bias = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([10.0, 0.0, 0.0, -10.0])
    weights, indices = fastattn.moe_route(logits, 2, score="sigmoid", bias=bias)
    assert indices.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, logits[:, [0, 2]].sigmoid())
    for dtype in (F16, BF16, torch.float64):
        assert torch.equal(fastattn.moe_route(logits, 2, score="sigmoid", bias=bias.to(dtype))[1], indices)


@pytest.mark.both
def test_ties_go_to_the_lower_id():
    assert fastattn.moe_route(torch.zeros(1, 40), 3)[1].tolist() == [[0, 1, 2]]
    logits = torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0, 1.0]])
    assert fastattn.moe_route(logits, 6)[1].tolist() == [[1, 3, 0, 5, 2, 4]]
    assert fastattn.moe_route(logits, 3, bias=torch.zeros(6), order="topk_then_score")[1].tolist() == [[1, 3, 0]]
    grouped = fastattn.moe_route(torch.zeros(2, 12), 4, num_groups=4, top_k_groups=2, bias=torch.zeros(12))[1]
    assert grouped.tolist() == [[0, 1, 2, 3]] * 2
    check_route((8 * torch.randn(30, 16)).round() / 8, 5)


@pytest.mark.both
def test_saturated_scores_are_told_apart_by_their_logits():
    logits = torch.tensor([[20.0, 30.0, 40.0, -200.0, -150.0]])
    assert fastattn.moe_route(logits, 5, score="sigmoid")[1].tolist() == [[2, 1, 0, 4, 3]]
    assert fastattn.moe_route(logits, 5)[1].tolist() == [[2, 1, 0, 4, 3]]


@pytest.mark.both
def test_no_weight_at_all_is_renormalised_to_none():
    weights, _ = fastattn.moe_route(torch.full((1, 4), -200.0), 2, score="sigmoid", renormalize=True)
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.both
@pytest.mark.parametrize("options", [MIXTRAL, GPT_OSS, LLAMA4, dict(num_groups=3, top_k_groups=2)], ids=str)
def test_infinities_and_nan_are_torch_s(options):
    logits = torch.randn(6, 12)
    logits[0, ::2] = -INF
    logits[1, 3] = INF
    logits[2, 7], logits[2, 9] = NAN, -NAN
    logits[3] = -INF
    logits[4] = NAN
    weights, indices = fastattn.moe_route(logits, 6, **options)
    expected, chosen = reference.moe_route(logits, 6, **options)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights, expected, equal_nan=True)
    assert all(len(set(row)) == 6 for row in indices.tolist()) and 0 <= indices.min() and indices.max() < 12
    if "num_groups" not in options:
        assert logits[2].topk(1).indices in (7, 9) and indices[2, :2].tolist() == [7, 9]


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_layout_of_logits(name):
    for num_experts in (16, 13):
        check_route(INPUT_LAYOUTS[name](torch.randn(5, num_experts).to(BF16)), 3)


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_layout_of_dweights(name):
    logits = torch.randn(5, 16)
    check_route(logits, 3, upstream(weights_of(3, MIXTRAL)[0], {"logits": logits}, UPSTREAM_LAYOUTS[name]), **MIXTRAL)


@pytest.mark.both
def test_permuted_tokens_are_permuted_all_the_way():
    x, logits, order = torch.randn(40, 24), torch.randn(40, 8), torch.randperm(40)

    def through(x, logits):
        weights, indices = fastattn.moe_route(logits, 3)
        plan = fastattn.moe_dispatch(indices, 8)
        return weights, indices, fastattn.moe_combine(fastattn.moe_gather(x, plan).sin(), plan, weights)

    for got, expected in zip(through(x[order], logits[order]), through(x, logits)):
        assert torch.equal(got, expected[order])


# --------------------------------------------------------------------------------------------------------------------
# transformers' routers.


def hf_router(name, num_experts, top_k, **fields):
    """A router of transformers with random weights, and its config's class."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from importlib import import_module

    folder, config, router = {
        "mixtral": ("mixtral", "MixtralConfig", "MixtralTopKRouter"),
        "qwen3": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter"),
        "gpt-oss": ("gpt_oss", "GptOssConfig", "GptOssTopKRouter"),
        "deepseek": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter"),
    }[name]
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    experts = {"qwen3": "num_experts", "deepseek": "n_routed_experts"}.get(name, "num_local_experts")
    made = getattr(transformers, config)(hidden_size=32, num_experts_per_tok=top_k, **{experts: num_experts}, **fields)
    made = getattr(module, router)(made)
    for t in (*made.parameters(), *made.buffers()):
        t.data.normal_(std=0.3)
    return made


@pytest.mark.both
@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (64, 8)])
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "qwen3 normed", "gpt-oss", "deepseek"])
def test_transformers_routers(name, num_experts, top_k):
    options, fields = dict(ROUTERS[name.split()[0]]), {}
    if name.startswith("qwen3"):
        options["renormalize"] = fields["norm_topk_prob"] = name.endswith("normed")
    elif name == "deepseek":
        fields = dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
        top_k = min(top_k, num_experts // 2)
    router = hf_router(name.split()[0], num_experts, top_k, **fields)
    if name == "deepseek":
        options["bias"] = router.e_score_correction_bias
    logits, weights, indices = router(torch.randn(50, 32))
    got, chosen = fastattn.moe_route(logits.detach(), top_k, **options)
    by_id, got_by_id = indices.argsort(1), chosen.argsort(1)  # DeepSeek's are in no order
    assert torch.equal(chosen.gather(1, got_by_id), indices.gather(1, by_id))
    torch.testing.assert_close(got.gather(1, got_by_id), weights.gather(1, by_id).detach(), rtol=2e-6, atol=1e-7)
    if name != "deepseek":
        assert torch.equal(chosen, indices)


def test_transformers_load_balancing_loss():
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(70, 8)
    _, indices = fastattn.moe_route(logits, 2)
    torch.testing.assert_close(fastattn.moe_load_balancing_loss(logits.softmax(1), indices), load_balancing_loss_func((logits,), 8, 2))


# --------------------------------------------------------------------------------------------------------------------
# Losses, counts, the bias.


@pytest.mark.both
@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_losses(num_tokens):
    logits, (indices, _) = torch.randn(num_tokens, 6), plan_for(num_tokens, 6, 2)
    share = torch.stack([(indices == e).sum() for e in range(6)]).double() / max(num_tokens, 1)
    oracles = {
        "balance": lambda x: 6 * (share * x.softmax(1).double().sum(0) / max(num_tokens, 1)).sum(),
        "z": lambda x: x.double().exp().sum(1).log().square().sum() / max(num_tokens, 1),
    }
    ops = {"balance": lambda x: fastattn.moe_load_balancing_loss(x.softmax(1), indices), "z": fastattn.moe_z_loss}
    for name, op in ops.items():
        leaf, leaf64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss, truth = op(leaf), oracles[name](leaf64)
        assert loss.dtype == F32 and loss.shape == ()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(a, b)[0].double() for a, b in ((loss, leaf), (truth, leaf64))), rtol=1e-4, atol=1e-6)


@pytest.mark.both
def test_balanced_tokens_have_the_least_loss():
    probs, indices = torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4
    torch.testing.assert_close(fastattn.moe_load_balancing_loss(probs, indices), torch.tensor(2.0))


@pytest.mark.both
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (70, 5), (3, 4, 5), (300,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts(shape, dtype):
    indices = torch.randint(9, shape).to(dtype)
    counts = fastattn.moe_expert_counts(indices, 7)
    assert counts.dtype == torch.int64 and counts.tolist() == [(indices == e).sum().item() for e in range(7)]


def test_bias_moves_toward_balance_in_place():
    for dtype in (F32, BF16):
        bias = torch.zeros(4, dtype=dtype)
        assert fastattn.moe_update_bias(bias, torch.tensor([0, 3, 9, 3]), 0.125) is bias
        assert bias.tolist() == [0.125, 0.125, -0.125, 0.125]
    bias = torch.zeros(3)
    fastattn.moe_update_bias(bias, torch.tensor([2.0, 2.0, 2.0]), 0.125)
    assert not bias.any()


def test_bias_balances_a_skewed_router():
    logits, bias = torch.randn(400, 8) + torch.linspace(0, 2, 8), torch.zeros(8)
    spread = []
    for _ in range(300):
        counts = fastattn.moe_expert_counts(fastattn.moe_route(logits, 2, score="sigmoid", bias=bias)[1], 8)
        fastattn.moe_update_bias(bias, counts, 0.005)
        spread.append((counts.max() - counts.min()).item())
    assert spread[0] > 150 and max(spread[-20:]) < 40


# --------------------------------------------------------------------------------------------------------------------
# The sort.

# (T, E, K): one block and several, more bins than a scan takes at once, one expert, one token, all of them.
PLANS = [(0, 3, 2), (1, 1, 1), (1, 512, 8), (5, 4, 2), (64, 9, 4), (129, 2, 4), (300, 16, 3), (90, 511, 6), (3, 8, 8), (70, 1, 1)]


@pytest.mark.both
@pytest.mark.parametrize("num_tokens, num_experts, top_k", PLANS, ids=str)
def test_plan(num_tokens, num_experts, top_k):
    indices, plan = plan_for(num_tokens, num_experts, top_k)
    check_plan(plan, indices, num_experts)
    check_plan(fastattn.moe_dispatch(indices.int(), num_experts), indices, num_experts)
    for got, expected in zip(plan, reference.moe_dispatch(indices, num_experts)):
        assert torch.equal(got, expected)


@pytest.mark.both
@pytest.mark.parametrize("expert", [0, 4, 6, 7, 2**40])
def test_all_slots_of_one_expert(expert):
    indices = torch.full((200, 2), expert)
    check_plan(fastattn.moe_dispatch(indices, 7), indices, 7)


@pytest.mark.both
@pytest.mark.parametrize("name", ["transposed", "padded rows", "expanded rows", "last dim strided"])
def test_any_layout_of_indices(name):
    indices = INPUT_LAYOUTS[name](torch.randint(6, (20, 3)))
    check_plan(fastattn.moe_dispatch(indices, 5), indices, 5)
    assert torch.equal(fastattn.moe_expert_counts(indices, 5), fastattn.moe_expert_counts(indices.contiguous(), 5))


@pytest.mark.both
@pytest.mark.more
def test_more_blocks_than_a_scan_takes_at_once():
    indices, plan = plan_for(9000, 20, 4)
    check_plan(plan, indices, 20)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_hostile_ids_below_the_check(dtype):
    from fastattn.kernels.moe_routing import moe_dispatch, moe_expert_counts

    worst = torch.iinfo(dtype)
    indices = torch.randint(-2, 9, (150, 2)).to(dtype)
    indices[::7, 0], indices[3::7, 1], indices[5] = worst.min, worst.max, -1
    check_plan(moe_dispatch(indices, 6), indices, 6)
    assert moe_expert_counts(indices, 6).tolist() == [(indices == e).sum().item() for e in range(6)]


@pytest.mark.interpret
def test_hostile_plans_below_the_check():
    """Rows that are no rows are nobody's, and offsets cannot promise more rows than there are."""
    from fastattn.kernels.moe_routing import moe_combine_bwd, moe_combine_fwd, moe_gather_fwd

    x, y, weights = torch.randn(4, 40), torch.randn(8, 40), torch.rand(4, 2)
    inverse = torch.tensor([3, -1, 8, 0, 2**62, 5, -(2**63), 1])
    for last in (0, 4, 8, 9, 2**31 - 1, -(2**31)):
        offsets = torch.tensor([2, last], dtype=torch.int32)
        kept = (inverse >= 0) & (inverse < min(last, 8))
        rows = torch.where(kept[:, None], y[inverse.clamp(0, 7)], 0.0).view(4, 2, 40)
        torch.testing.assert_close(moe_combine_fwd(y, inverse, offsets, weights, 2), (weights[..., None] * rows).sum(1))
        gathered = moe_gather_fwd(x, inverse, offsets, 2)
        assert torch.equal(gathered[inverse[kept]], x.repeat_interleave(2, 0)[kept])
        dy, dweights = moe_combine_bwd(x, y, inverse, offsets, weights)
        torch.testing.assert_close(dweights, (x[:, None] * rows).sum(2))
        torch.testing.assert_close(dy[inverse[kept]], (weights[..., None] * x[:, None]).flatten(0, 1)[kept])


@pytest.mark.interpret
def test_hostile_indices_of_a_routing_s_backward():
    from fastattn.kernels.moe_routing import moe_route_bwd

    indices = torch.tensor([[-1, 8], [2**40, 3], [-(2**63), 2**63 - 1]])
    dlogits = moe_route_bwd(torch.ones(3, 2), torch.randn(3, 8), indices, "sigmoid", "score_then_topk", False, 1.0)
    assert dlogits[1, 3] > 0 and (dlogits != 0).sum() == 1


# --------------------------------------------------------------------------------------------------------------------
# Gather and combine.

# (T, E, K, H): odd columns, several blocks of them, tokens that fill programs and that do not, more rows than are written out.
MOVES = [(1, 2, 1, 1), (5, 4, 2, 64), (33, 3, 3, 33), (3, 8, 8, 1000), (2, 5, 2, 4100), (3, 2, 20, 24), (70, 4, 2, 16)]


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens, num_experts, top_k, num_cols", MOVES, ids=str)
def test_gather_and_combine(num_tokens, num_experts, top_k, num_cols, dtype):
    plan, tensors = moved(num_tokens, num_experts, top_k, num_cols, dtype)
    check_op(f"moe_combine {tuple(tensors['y'].shape)}", *combine(plan), tensors)
    result = check_op("moe_gather", *gather(plan), {"x": torch.randn(num_tokens, num_cols).to(dtype)})
    assert result["out0"].shape == tensors["y"].shape


@pytest.mark.both
def test_nothing_to_move():
    plan, tensors = moved(0, 3, 2, 8)
    result = check_op("moe_combine", *combine(plan), tensors)
    assert result["out0"].shape == (0, 8) and result["dweights"].shape == (0, 2)
    assert check_op("moe_gather", *gather(plan), {"x": torch.randn(0, 8)})["out0"].shape == (0, 8)


@pytest.mark.both
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_what_no_expert_has_is_never_looked_at(garbage):
    plan, tensors = moved(40, 3, 2, 24)
    nobody = torch.arange(80) >= plan.offsets[-1]
    assert nobody.any() and not nobody.all()
    tensors["y"][nobody] = garbage
    result = check_op("moe_combine", *combine(plan), tensors)
    assert not result["dy"][nobody].any() and not result["dweights"].flatten()[plan.order[nobody]].any()
    gathered = check_op("moe_gather", *gather(plan), {"x": torch.randn(40, 24)})
    assert not gathered["out0"][nobody].any()


@pytest.mark.both
def test_nobody_has_anything():
    plan = fastattn.moe_dispatch(torch.full((5, 2), 3), 3)
    assert not fastattn.moe_combine(torch.full((10, 8), NAN), plan, torch.ones(5, 2)).any()


@pytest.mark.both
def test_there_and_back_is_the_identity():
    x, (weights, indices) = torch.randn(50, 40), fastattn.moe_route(torch.randn(50, 8), 3, renormalize=True)
    plan = fastattn.moe_dispatch(indices, 8)
    rows = fastattn.moe_gather(x, plan)
    assert torch.equal(rows, x[plan.order // 3])
    torch.testing.assert_close(fastattn.moe_combine(rows, plan, weights), x)
    assert torch.equal(fastattn.moe_combine(rows, plan, torch.tensor([0.0, 1.0, 0.0]).expand(50, 3)), x)


@pytest.mark.both
def test_each_is_the_other_s_backward():
    plan, _ = moved(20, 4, 3, 16)
    x, y = torch.randn(20, 16, requires_grad=True), torch.randn(60, 16, requires_grad=True)
    gathered, combined = fastattn.moe_gather(x, plan), fastattn.moe_combine(y, plan, torch.ones(20, 3))
    assert torch.equal(torch.autograd.grad(gathered, x, y)[0], combined)
    assert torch.equal(torch.autograd.grad(combined, y, x)[0], gathered)


@pytest.mark.both
def test_two_runs_are_one():
    plan, tensors = moved(60, 5, 4, 100, BF16)

    def once():
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        out = fastattn.moe_combine(leaves[0], fastattn.moe_dispatch(plan.order.view(60, 4) % 7, 5), leaves[1])
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_layout(name):
    for num_cols in (16, 13):
        plan, tensors = moved(6, 3, 2, num_cols, BF16)
        check_op("moe_combine", *combine(plan), {key: INPUT_LAYOUTS[name](t) for key, t in tensors.items()})
        check_op("moe_gather", *gather(plan), {"x": INPUT_LAYOUTS[name](torch.randn(6, num_cols).to(BF16))})


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(name):
    plan, tensors = moved(6, 3, 2, 16)
    check_op("moe_combine", *combine(plan), tensors, upstream(combine(plan)[0], tensors, UPSTREAM_LAYOUTS[name]))
    x = {"x": torch.randn(6, 16)}
    check_op("moe_gather", *gather(plan), x, upstream(gather(plan)[0], x, UPSTREAM_LAYOUTS[name]))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_weights_in_half_precision(dtype):
    plan, tensors = moved(6, 3, 2, 16)
    tensors["weights"] = tensors["weights"].to(dtype)
    result = check_op("moe_combine", combine(plan)[0], lambda y, weights: reference.moe_combine(y, plan, weights.to(y.dtype)), tensors)
    assert result["dweights"].dtype == dtype


@pytest.mark.both
def test_pure():
    plan, tensors = moved(6, 3, 2, 16)
    check_pure(combine(plan)[0], tensors)
    check_pure(gather(plan)[0], {"x": torch.randn(6, 16)})
    check_pure(weights_of(2, MIXTRAL)[0], {"logits": torch.randn(6, 8)})


@pytest.mark.interpret
def test_rows_past_2_31_elements():
    from fastattn.kernels.moe_routing import moe_combine_fwd, moe_gather_fwd

    stride = 2**31 + 8
    storage = torch.UntypedStorage(2 * (stride + 16))  # reserved, not filled
    wide = torch.empty(0, dtype=F16).set_(storage, 0, (2, 16), (stride, 1))
    wide.copy_(torch.randn(2, 16))
    inverse, offsets = torch.tensor([1, 0]), torch.tensor([2], dtype=torch.int32)
    assert torch.equal(moe_combine_fwd(wide, inverse, offsets, None, 1), wide.flip(0))
    assert torch.equal(moe_gather_fwd(wide, inverse, offsets, 1), wide.flip(0))


@pytest.mark.interpret
def test_program_order_does_not_matter():
    from fastattn.testing.checker import assert_order_independent

    x, logits, bias, dout = torch.randn(150, 20), torch.randn(150, 64), torch.randn(64), torch.randn(150, 20)

    def everything():
        leaves = [t.clone().requires_grad_() for t in (x, logits)]
        weights, indices = fastattn.moe_route(leaves[1], 4, score="sigmoid", bias=bias, num_groups=8, top_k_groups=4)
        plan = fastattn.moe_dispatch(indices, 60)
        out = fastattn.moe_combine(fastattn.moe_gather(leaves[0], plan), plan, weights)
        return out, weights, indices, *plan, *torch.autograd.grad(out, leaves, dout)

    assert_order_independent(everything)


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

LOGITS, IDS, X = torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 16)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logits=None), TypeError, r"logits must be a torch.Tensor, got NoneType"),
        (dict(logits=LOGITS.double()), TypeError, r"logits must be float16, bfloat16 or float32, got torch.float64"),
        (dict(logits=LOGITS[0]), ValueError, r"logits must have shape \(T, E\), got \(8,\)"),
        (dict(logits=LOGITS[:, :0]), ValueError, r"logits must have at least 1 column, got \(5, 0\)"),
        (dict(logits=torch.zeros(1, 513)), ValueError, r"logits must have at most 512 experts, got \(1, 513\)"),
        (dict(top_k=9), ValueError, r"top_k must lie in \[1, 8\], as many experts as can be chosen, got 9"),
        (dict(top_k=0), ValueError, r"top_k must lie in \[1, 8\]"),
        (dict(top_k=2.0), TypeError, r"top_k must be an int, got float"),
        (dict(score="relu"), ValueError, r"score must be one of 'softmax', 'sigmoid', got 'relu'"),
        (dict(order="topk"), ValueError, r"order must be one of 'score_then_topk', 'topk_then_score', got 'topk'"),
        (dict(bias=1.0), TypeError, r"bias must be a torch.Tensor, got float"),
        (dict(bias=torch.zeros(8).int()), TypeError, r"bias must have a floating-point dtype, got torch.int32"),
        (dict(bias=torch.zeros(7)), ValueError, r"bias must have shape \(E,\) = \(8,\), got \(7,\)"),
        (dict(bias=torch.zeros(8, device="meta")), ValueError, r"bias must be on logits' device cpu, got meta"),
        (dict(bias=torch.zeros(8, requires_grad=True)), ValueError, r"bias must not require a gradient \(it moves the choice alone\)"),
        (dict(num_groups=2), ValueError, r"num_groups and top_k_groups must be given together"),
        (dict(num_groups=3, top_k_groups=1), ValueError, r"num_groups must divide the number of experts 8, got 3"),
        (dict(num_groups=9, top_k_groups=1), ValueError, r"num_groups must lie in \[1, 8\], got 9"),
        (dict(num_groups=4, top_k_groups=5), ValueError, r"top_k_groups must lie in \[1, 4\], got 5"),
        (dict(num_groups=8, top_k_groups=1), ValueError, r"top_k must lie in \[1, 1\], as many experts as can be chosen, got 2"),
        (dict(scaling_factor=INF), ValueError, r"scaling_factor must be finite, got inf"),
        (dict(scaling_factor=torch.ones(())), TypeError, r"scaling_factor must be a Python number, got Tensor"),
    ],
)  # fmt: skip
def test_bad_routing(change, error, message):
    with pytest.raises(error, match="moe_route: " + message):
        fastattn.moe_route(**dict(logits=LOGITS, top_k=2) | change)


@pytest.mark.both
@pytest.mark.parametrize(
    "args, error, message",
    [
        (([[0]], 8), TypeError, r"indices must be a torch.Tensor, got list"),
        ((IDS.float(), 8), TypeError, r"indices must be int32 or int64, got torch.float32"),
        ((IDS, 0), ValueError, r"num_experts must lie in \[1, 512\], got 0"),
        ((IDS, 513), ValueError, r"num_experts must lie in \[1, 512\], got 513"),
        ((IDS - 3, 8), ValueError, r"indices must hold ids of 0 or more \(those of num_experts or more are nobody's\), got -3"),
    ],
)
def test_bad_ids(args, error, message):
    for name in ("moe_dispatch", "moe_expert_counts"):
        with pytest.raises(error, match=f"{name}: " + message):
            getattr(fastattn, name)(*args)


def test_more_bad_input():
    plan = fastattn.moe_dispatch(IDS, 8)
    rows, weights = torch.zeros(10, 16), torch.zeros(5, 2)
    for call, error, message in (
        (lambda: fastattn.moe_dispatch(IDS[0], 8), ValueError, r"moe_dispatch: indices must have shape \(T, K\), got \(2,\)"),
        (lambda: fastattn.moe_dispatch(IDS[:, :0], 8), ValueError, r"moe_dispatch: indices must have shape \(T, K\), got \(5, 0\)"),
        (lambda: fastattn.moe_gather(X.double(), plan), TypeError, r"moe_gather: x must be float16, bfloat16 or float32"),
        (lambda: fastattn.moe_gather(X[0], plan), ValueError, r"moe_gather: x must have shape \(T, H\), got \(16,\)"),
        (lambda: fastattn.moe_gather(X, None), TypeError, r"moe_gather: plan must be what moe_dispatch returns, got NoneType"),
        (lambda: fastattn.moe_gather(X[:3], plan), ValueError, r"moe_gather: x must have shape \(T, H\) with T·K = 10 to match plan, got \(3, 16\)"),
        (lambda: fastattn.moe_gather(X[:0], plan), ValueError, r"moe_gather: x must have shape \(T, H\) with T·K = 10 to match plan"),
        (lambda: fastattn.moe_combine(rows, plan._replace(offsets=plan.offsets.long()), weights), TypeError, r"moe_combine: plan.offsets must be int32, got torch.int64"),
        (lambda: fastattn.moe_combine(rows, plan._replace(order=plan.order[None]), weights), ValueError, r"moe_combine: plan.order must have one dim, got \(1, 10\)"),
        (lambda: fastattn.moe_combine(rows, plan._replace(inverse=plan.inverse[1:]), weights), ValueError, r"moe_combine: plan.inverse must have plan.order's shape \(10,\), got \(9,\)"),
        (lambda: fastattn.moe_combine(rows, plan._replace(inverse=plan.inverse.to("meta")), weights), ValueError, r"moe_combine: plan.inverse must be on y's device cpu, got meta"),
        (lambda: fastattn.moe_combine(rows, plan._replace(offsets=plan.offsets[:0]), weights), ValueError, r"moe_combine: plan.offsets must have shape \(E,\), got \(0,\)"),
        (lambda: fastattn.moe_combine(rows[1:], plan, weights), ValueError, r"moe_combine: y must have shape \(T·K, H\) with T·K = 10 to match plan, got \(9, 16\)"),
        (lambda: fastattn.moe_combine(rows, plan, weights[1:]), ValueError, r"moe_combine: weights must have shape \(T, K\) with T·K = 10 to match plan, got \(4, 2\)"),
        (lambda: fastattn.moe_combine(rows, plan, weights.int()), TypeError, r"moe_combine: weights must be float16, bfloat16 or float32, got torch.int32"),
        (lambda: fastattn.moe_load_balancing_loss(LOGITS, IDS[1:]), ValueError, r"moe_load_balancing_loss: indices must have shape \(T, K\) with T = 5, got \(4, 2\)"),
        (lambda: fastattn.moe_load_balancing_loss(LOGITS[0], IDS), ValueError, r"moe_load_balancing_loss: probs must have shape \(T, E\), got \(8,\)"),
        (lambda: fastattn.moe_z_loss(LOGITS.int()), TypeError, r"moe_z_loss: logits must have a floating-point dtype, got torch.int32"),
        (lambda: fastattn.moe_z_loss(LOGITS[0]), ValueError, r"moe_z_loss: logits must have shape \(T, E\), got \(8,\)"),
        (lambda: fastattn.moe_update_bias(torch.zeros(3), IDS[0], 1.0), ValueError, r"moe_update_bias: counts must have bias's shape \(3,\), got \(2,\)"),
        (lambda: fastattn.moe_update_bias(torch.zeros(2, requires_grad=True), IDS[0], 1.0), ValueError, r"moe_update_bias: bias must not require a gradient \(it is written in place\)"),
        (lambda: fastattn.moe_update_bias(torch.zeros(2), IDS[0], None), TypeError, r"moe_update_bias: rate must be a Python number, got NoneType"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@pytest.mark.both
def test_operators():
    ops, logits, bias = torch.ops.fastattn, torch.randn(6, 8).to(BF16), torch.randn(8)
    routing = ("sigmoid", "score_then_topk")
    check_operator(ops.moe_route_fwd, logits, bias, 2, *routing, 4, 2, True, 2.5)
    check_operator(ops.moe_route_fwd, logits.t(), None, 2, "softmax", "topk_then_score", 1, 1, False, 1.0)
    weights, indices = fastattn.moe_route(logits, 2)
    check_operator(ops.moe_route_bwd, weights, logits, indices, *routing, True, 2.5)
    check_operator(ops.moe_dispatch, indices, 7)
    check_operator(ops.moe_expert_counts, indices, 7)
    plan, tensors = moved(6, 3, 2, 16, BF16)
    x = torch.randn(6, 16).to(BF16)
    check_operator(ops.moe_gather_fwd, x, plan.inverse, plan.offsets, 2)
    for weights in (None, tensors["weights"]):
        check_operator(ops.moe_combine_fwd, tensors["y"], plan.inverse, plan.offsets, weights, 2)
    check_operator(ops.moe_combine_bwd, x, tensors["y"], plan.inverse, plan.offsets, tensors["weights"])
    check_operator(ops.moe_combine_bwd, x[:, :1].expand(6, 16), tensors["y"], plan.inverse, plan.offsets, tensors["weights"])


@pytest.mark.both
def test_transforms():
    plan, tensors = moved(6, 3, 2, 16)
    check_transforms("moe_combine", combine(plan)[0], tensors)
    # A gather is linear: what its gradient depends on is the upstream one.
    check_transforms("moe_gather", lambda x: fastattn.moe_gather(x, plan).square(), {"x": torch.randn(6, 16)})
    check_transforms("moe_route", weights_of(2, MIXTRAL)[0], {"logits": torch.randn(6, 8)})


def through(x, logits, bias):
    """A layer without its experts, with both losses."""
    weights, indices = fastattn.moe_route(logits, 2, score="sigmoid", bias=bias, num_groups=4, top_k_groups=2, renormalize=True)
    plan = fastattn.moe_dispatch(indices, 7)
    out = fastattn.moe_combine(fastattn.moe_gather(x, plan), plan, weights)
    losses = fastattn.moe_load_balancing_loss(logits.softmax(-1), indices % 8) + fastattn.moe_z_loss(logits)
    return out, losses, plan.offsets, plan.order


def layer():
    bias = torch.randn(8)
    return (lambda x, logits: through(x, logits, bias)), {"x": torch.randn(12, 16), "logits": torch.randn(12, 8)}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    plan, tensors = moved(6, 3, 2, 16)
    check_compiled(combine(plan)[0], tensors, dynamic)
    check_compiled(weights_of(2, MIXTRAL)[0], {"logits": torch.randn(6, 8)}, dynamic)


@pytest.mark.both
def test_a_compiled_layer_is_eager():
    check_compiled(*layer(), backend="aot_eager")


def test_a_compiled_plan_is_one_graph_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(fastattn.moe_dispatch, fullgraph=True, dynamic=True)
    for num_tokens in (5, 9, 30):
        indices, plan = plan_for(num_tokens, 4, 2)
        got = compiled(indices, 4)
        assert isinstance(got, MoEPlan) and all(torch.equal(a, b) for a, b in zip(got, plan))
    torch._dynamo.reset()


def test_compiled_bias_update():
    torch._dynamo.reset()
    bias, expected, counts = torch.zeros(4), torch.zeros(4), torch.tensor([0, 3, 9, 3])
    torch.compile(fastattn.moe_update_bias, fullgraph=True)(bias, counts, 0.5)
    assert torch.equal(bias, fastattn.moe_update_bias(expected, counts, 0.5))
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "moe_routing")


def every_operator(ops, num_tokens, num_experts=64, top_k=4, num_cols=128):
    """Calls each implementation on tensors of T tokens."""
    logits, indices = torch.zeros(num_tokens, num_experts), torch.zeros(num_tokens, top_k, dtype=torch.int64)
    weights, x, y = torch.zeros(num_tokens, top_k), *(torch.zeros(n, num_cols, dtype=BF16) for n in (num_tokens, num_tokens * top_k))
    plan = torch.zeros(num_tokens * top_k, dtype=torch.int64), torch.zeros(num_experts, dtype=torch.int32)
    ops._moe_route_fwd(logits, torch.zeros(num_experts), top_k, "sigmoid", "score_then_topk", 8, 4, True, 2.5)
    ops._moe_route_bwd(weights, logits, indices, "sigmoid", "score_then_topk", True, 2.5)
    ops._moe_dispatch(indices, num_experts)
    ops._moe_expert_counts(indices, num_experts)
    ops._moe_gather_fwd(x, *plan, top_k)
    ops._moe_combine_fwd(y, *plan, weights, top_k)
    ops._moe_combine_bwd(x, y, *plan, weights)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_never_syncs(as_on_cuda, capability):
    launches = launched_on(capability, lambda: every_operator(as_on_cuda, 100))
    assert [launch.name.removeprefix("_moe_").removesuffix("_kernel") for launch in launches] == [
        "route_fwd", "route_bwd", "count", "scan", "place", "count", "scan", "gather_fwd", "combine_fwd", "combine_bwd",
    ]  # fmt: skip


def test_numbers_of_tokens_choose_no_variant(as_on_cuda):
    from fastattn.kernels import moe_routing
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_tokens in (1, 2, 15, 16, 17, 64, 1000, 4097):
            every_operator(as_on_cuda, num_tokens)
        for name in ("route_fwd", "route_bwd", "count", "gather_fwd", "combine_fwd", "combine_bwd"):
            assert compiled_variants(getattr(moe_routing, f"_moe_{name}_kernel")) == 1, name
        assert compiled_variants(moe_routing._moe_scan_kernel) == 2  # totals in int32 for a plan, in int64 for counts
        assert compiled_variants(moe_routing._moe_place_kernel) == 2  # of slots that one block has, and of more


def test_more_slots_or_tokens_than_32_bits_count_are_refused():
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels.moe_routing import _count, _grid

    with pytest.raises(ValueError, match=r"moe_dispatch: the input must need fewer than 2\^31 programs, got 2147483648"):
        _count("moe_dispatch", torch.empty(1, dtype=torch.int32).expand(2**31 - 256), 8, torch.int32)
    with pytest.raises(ValueError, match=r"moe_combine: the input must need fewer than 2\^31 programs"):
        _grid("moe_combine", 2**31 - 8, 16)
