"""Operators of DTensors over two ranks are those of tensors: results, gradients, their placements, and that nothing was sent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from two_ranks import RANKS, case, equal

import fastattn

R, SUM = Replicate(), Partial("sum")
S = [Shard(i) for i in range(5)]


def check(
    mesh: DeviceMesh, op: Callable, tensors: dict[str, Tensor], sharded: dict[str, Shard], outs: list | None = None,
    grads: dict[str, object] | None = None, tensors_of: Callable = lambda result: result,
) -> None:  # fmt: skip
    """`op` of DTensors is op of tensors, results and gradients.

    sharded: which of them are, the others being replicated. outs, grads: the placements that results and gradients have; then nothing may
    have been sent. None: whatever they are, and at whatever cost.
    """

    def flat(result: object) -> list[Tensor]:
        result = tensors_of(result)
        return [result] if isinstance(result, Tensor) else list(result)

    def leaves(made: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: made(name, t).requires_grad_(t.is_floating_point() and t.requires_grad) for name, t in tensors.items()}

    plain = leaves(lambda name, t: t.detach().clone())
    spread = leaves(lambda name, t: distribute_tensor(t.detach(), mesh, [sharded.get(name, R)] * mesh.ndim))
    expected = flat(op(**plain))
    douts = [torch.randn(t.shape) for t in expected]
    with CommDebugMode() as sent:
        got = flat(op(**spread))
    assert all(isinstance(t, DTensor) for t in got), got
    if outs is not None:
        assert [t.placements[0] for t in got] == outs, [t.placements for t in got]
        assert sent.get_total_counts() == 0, sent.get_comm_counts()
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        equal(mine.full_tensor(), theirs, f"result {i}")
    learnt = [name for name, t in plain.items() if t.requires_grad]
    if not learnt:
        return
    pairs = [(mine, theirs, dout) for mine, theirs, dout in zip(got, expected, douts, strict=True) if theirs.requires_grad]
    theirs = torch.autograd.grad([t for _, t, _ in pairs], [plain[name] for name in learnt], [dout for *_, dout in pairs])
    placed = [t.placements[0] if isinstance(t.placements[0], Shard) else R for t, *_ in pairs]
    spread_douts = [distribute_tensor(dout, mesh, [p] * mesh.ndim) for (*_, dout), p in zip(pairs, placed, strict=True)]
    with CommDebugMode() as sent:
        mine = torch.autograd.grad([t for t, *_ in pairs], [spread[name] for name in learnt], spread_douts)
    if grads is not None:
        assert {name: grad.placements[0] for name, grad in zip(learnt, mine)} == grads, [g.placements for g in mine]
        assert sent.get_total_counts() == 0, sent.get_comm_counts()
    for name, a, b in zip(learnt, mine, theirs, strict=True):
        equal(a.full_tensor(), b, f"d{name}")


def learn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# --------------------------------------------------------------------------------------------------------------------
# Operators.


def qkv(heads: int = 4, kv_heads: int = 2) -> dict[str, Tensor]:
    return {"q": learn(2, 6, heads, 8), "k": learn(2, 7, kv_heads, 8), "v": learn(2, 7, kv_heads, 5)}


def with_lse(**options: object) -> Callable:
    return lambda q, k, v, **tensors: fastattn.attention(q, k, v, return_lse=True, **options, **tensors)


@case
def attention_by_batch(mesh):
    tensors = {**qkv(), "attn_bias": learn(2, 1, 6, 7), "sinks": learn(4), "alibi_slopes": torch.rand(2, 4)}
    of_batch = dict.fromkeys(("q", "k", "v", "attn_bias", "alibi_slopes"), S[0])
    grads = dict.fromkeys(("q", "k", "v", "attn_bias"), S[0]) | {"sinks": SUM}
    check(mesh, with_lse(causal=True, window=(3, None)), tensors, of_batch, [S[0], S[0]], grads)
    tensors |= {"attn_bias": learn(4, 6, 7)}
    del of_batch["attn_bias"]
    check(mesh, with_lse(), tensors, of_batch, [S[0], S[0]], grads | {"attn_bias": SUM})


@case
def attention_by_heads(mesh):
    tensors = {**qkv(), "attn_bias": learn(4, 6, 7), "sinks": learn(4), "alibi_slopes": torch.rand(4)}
    of_heads = dict.fromkeys(("q", "k", "v"), S[2]) | dict.fromkeys(("attn_bias", "sinks", "alibi_slopes"), S[0])
    check(mesh, with_lse(causal=True, softcap=5.0), tensors, of_heads, [S[2], S[1]], {
        "q": S[2], "k": S[2], "v": S[2], "attn_bias": S[0], "sinks": S[0],
    })  # fmt: skip
    check(mesh, fastattn.attention, qkv(), of_heads, [S[2]], dict.fromkeys("qkv", S[2]))  # weights are kept for the backward


@case
def attention_of_one_key_head(mesh):
    check(mesh, with_lse(causal=True), qkv(4, 1), {"q": S[2]}, [S[2], S[1]], {"q": S[2], "k": SUM, "v": SUM})


@case
def attention_of_packed_sequences_by_heads(mesh):
    ends = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    tensors = {"q": learn(9, 4, 8), "k": learn(9, 2, 8), "v": learn(9, 2, 8), "cu_seqlens_q": ends, "cu_seqlens_k": ends.clone()}
    check(mesh, with_lse(causal=True), tensors, dict.fromkeys("qkv", S[1]), [S[1], S[0]], dict.fromkeys("qkv", S[1]))


@case
def attention_gathers_what_cannot_be_sharded(mesh):
    check(mesh, with_lse(causal=True), qkv(6, 3), dict.fromkeys("qkv", S[2]))  # three key heads over two ranks
    check(mesh, with_lse(causal=True), qkv(), dict.fromkeys("qkv", S[1]))  # sequences


@case
def attention_by_batch_and_heads(mesh):
    grid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("data", "model"))
    tensors = qkv()
    q, k, v = (distribute_tensor(t.detach(), grid, [S[0], S[2]]) for t in tensors.values())
    out = fastattn.attention(q, k, v, causal=True)
    assert out.placements == (S[0], S[2])
    equal(out.full_tensor(), fastattn.attention(**tensors, causal=True), "out")


@case
def dropout_masks_of_shards_are_their_own(mesh):
    """Equal in forward and backward: out is linear in v, so that ⟨dout, out⟩ = ⟨dv, v⟩. Of equal heads or rows, shards drop others."""
    q, k = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
    v = torch.ones(1, 16, 2, 8)
    spread = [distribute_tensor(t, mesh, [S[2]]).requires_grad_() for t in (q, k, v)]
    out = fastattn.attention(*spread, dropout_p=0.5)
    dout = torch.randn_like(out.full_tensor())
    out.backward(distribute_tensor(dout, mesh, [S[2]]))
    equal((out.full_tensor() * dout).sum(), (spread[2].grad.full_tensor() * v).sum(), "⟨dout, out⟩")
    first, second = out.full_tensor().unbind(2)
    assert not torch.equal(first, second)

    x = distribute_tensor(torch.ones(4, 64), mesh, [S[0]]).requires_grad_()
    _, h = fastattn.add_rms_norm(x, distribute_tensor(torch.zeros(4, 64), mesh, [S[0]]), 64, dropout_p=0.5)
    h.sum().backward()
    kept = h.full_tensor()
    assert torch.equal(x.grad.full_tensor(), kept) and not torch.equal(kept[:2], kept[2:])
    replicated = distribute_tensor(torch.ones(2, 64), mesh, [R])
    y, h = fastattn.add_rms_norm(replicated, replicated, 64, dropout_p=0.5)
    ranks = [torch.empty(2, 64) for _ in range(RANKS)]
    dist.all_gather(ranks, h.to_local())
    assert torch.equal(*ranks), "what is replicated drops the same everywhere"


@case
def merge_attention(mesh):
    tensors = {"outs": learn(3, 2, 6, 4, 5), "lses": learn(3, 2, 4, 6)}
    for dim, lse_dim in ((1, 1), (2, 3), (3, 2)):
        sharded = {"outs": S[dim], "lses": S[lse_dim]}
        check(mesh, fastattn.merge_attention, tensors, sharded, [S[dim - 1], S[lse_dim - 1]], sharded)


@case
def paged_attention(mesh):
    tensors = {
        "q": torch.randn(2, 1, 4, 8), "k_cache": torch.randn(5, 4, 2, 8), "v_cache": torch.randn(5, 4, 2, 8), "sinks": torch.randn(4),
        "page_table": torch.tensor([[3, 1], [4, 0]], dtype=torch.int32), "seqlens_k": torch.tensor([7, 3], dtype=torch.int32),
    }  # fmt: skip
    of_heads = dict.fromkeys(("q", "k_cache", "v_cache"), S[2]) | {"sinks": S[0]}
    of_batch = dict.fromkeys(("q", "page_table", "seqlens_k"), S[0])
    op = lambda **given: fastattn.paged_attention(return_lse=True, **given)  # noqa: E731
    check(mesh, op, tensors, of_heads, [S[2], S[1]])
    check(mesh, op, tensors, of_batch, [S[0], S[0]])


@case
def rotary(mesh):
    angles = torch.rand(6, 4)
    tensors = {"q": learn(2, 6, 4, 8), "k": learn(2, 6, 2, 8), "cos": angles.cos(), "sin": angles.sin()}
    for dim in (0, 2):
        both = {"q": S[dim], "k": S[dim]}
        check(mesh, fastattn.apply_rotary, tensors, both, [S[dim]] * 2, both)
    one = tensors | {"k": learn(2, 6, 1, 8)}
    check(mesh, fastattn.apply_rotary, one, {"q": S[2]}, [S[2], R], {"q": S[2], "k": R})
    check(mesh, fastattn.apply_rotary, tensors, {"q": S[1], "k": S[1]})  # positions are those of whole sequences
    tensors["positions"] = torch.tensor([[5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]])
    of_tokens = {"q": S[1], "k": S[1]}
    check(mesh, fastattn.apply_rotary, tensors, of_tokens | {"positions": S[1]}, [S[1]] * 2, of_tokens)


@case
def norms(mesh):
    for d in (0, 1):
        tensors = {"x": learn(2, 4, 12), "weight": learn(12), "bias": learn(12)}
        check(
            mesh, lambda x, weight, bias: fastattn.layer_norm(x, 12, weight, bias), tensors, {"x": S[d]}, [S[d]],
            {"x": S[d], "weight": SUM, "bias": SUM},
        )  # fmt: skip
        tensors = {"x": learn(2, 4, 12), "residual": learn(2, 4, 12), "weight": learn(12)}
        check(
            mesh, lambda x, residual, weight: fastattn.add_rms_norm(x, residual, 12, weight), tensors, {"x": S[d], "residual": S[d]},
            [S[d]] * 2, {"x": S[d], "residual": S[d], "weight": SUM},
        )  # fmt: skip
    check(mesh, lambda x: fastattn.rms_norm(x, 12), {"x": learn(4, 12)}, {"x": S[1]})  # along the rows


@case
def flags_are_told_apart(mesh):
    """DTensor remembers what came of a rule: a gradient of the weight or none, the weights of attention kept or not, a plan or none."""
    rows = {"x": S[0], "residual": S[0]}
    for wanted in (False, True, False):
        weight = torch.randn(12, requires_grad=wanted)
        grads = {"x": S[0]} | ({"weight": SUM} if wanted else {})
        check(mesh, lambda x, weight: fastattn.rms_norm(x, 12, weight), {"x": learn(4, 12), "weight": weight}, rows, [S[0]], grads)
    for keep in (False, True, False):
        tensors = {name: t.detach().requires_grad_(keep) for name, t in qkv().items()}
        check(mesh, fastattn.attention, tensors, dict.fromkeys("qkv", S[0]), [S[0]], dict.fromkeys("qkv", S[0]))
    for wanted in (["x"], ["down_proj"], [], ["x"]):
        tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in mixture(False, False).items()}
        sharded = {"gate_up_proj": S[1], "down_proj": S[2]}
        op = lambda **given: fastattn.moe(layout="interleaved", **given)  # noqa: E731
        check(mesh, op, tensors, sharded, [SUM], {name: sharded.get(name, SUM) for name in wanted})
    for reduction, loss in (("sum", SUM), ("none", S[0]), ("sum", SUM)):
        tensors = {"input": learn(4, 7), "target": torch.tensor([3, 1, 0, 5])}
        op = lambda reduction=reduction, **given: fastattn.cross_entropy(reduction=reduction, **given)  # noqa: E731
        check(mesh, op, tensors, dict.fromkeys(tensors, S[0]), [loss], {"input": S[0]})


@case
def row_ops(mesh):
    for d, dim in ((0, 1), (1, 0), (0, 2)):
        check(mesh, lambda x, dim=dim: fastattn.softmax(x, dim), {"x": learn(2, 4, 6)}, {"x": S[d]}, [S[d]], {"x": S[d]})
    check(mesh, lambda x: fastattn.softmax(x, -1), {"x": learn(2, 4)}, {"x": S[1]})  # along the rows
    pair = {"gate": learn(2, 6), "up": learn(2, 6)}
    for d in (0, 1):
        both = {"gate": S[d], "up": S[d]}
        check(mesh, fastattn.swiglu, pair, both, [S[d]], both)
    check(mesh, fastattn.geglu, {"gate": learn(2, 6)}, {"gate": S[0]}, [S[0]], {"gate": S[0]})
    check(mesh, fastattn.geglu, {"gate": learn(2, 12)}, {"gate": S[1]})  # [gate; up] torn apart
    tensors = {"logits": torch.randn(4, 9), "top_p": torch.rand(4)}
    check(mesh, fastattn.sampling_probs, tensors, dict.fromkeys(tensors, S[0]), [S[0]])


@case
def losses(mesh):
    target, weight = torch.tensor([3, -100, 0, 5]), torch.rand(7)
    for reduction, loss in (("none", S[0]), ("sum", SUM)):
        tensors = {"input": learn(4, 7), "target": target, "weight": weight}
        rows = {"input": S[0], "target": S[0]}
        op = lambda reduction=reduction, **given: fastattn.cross_entropy(reduction=reduction, z_loss=0.1, return_lse=True, **given)  # noqa: E731
        check(mesh, op, tensors, rows, [loss, S[0]], {"input": S[0]})
        tensors = {"input": learn(4, 6), "linear_weight": learn(7, 6), "linear_bias": learn(7), "target": target, "weight": weight}
        op = lambda reduction=reduction, **given: fastattn.linear_cross_entropy(reduction=reduction, **given)  # noqa: E731
        grads = {"input": S[0], "linear_weight": SUM, "linear_bias": SUM}
        check(mesh, op, tensors, rows, [loss], grads)
    check(mesh, fastattn.cross_entropy, {"input": learn(4, 7), "target": target}, rows)  # a mean
    check(mesh, fastattn.linear_cross_entropy, {"input": learn(4, 6), "linear_weight": learn(7, 6), "target": target}, rows)
    images = {"input": learn(2, 7, 4), "target": torch.randint(7, (2, 4))}
    check(mesh, lambda **given: fastattn.cross_entropy(reduction="sum", **given), images, dict.fromkeys(images, S[0]))


# --------------------------------------------------------------------------------------------------------------------
# Mixtures of experts.


@case
def routing(mesh):
    logits = {"logits": learn(6, 4)}
    check(mesh, lambda logits: fastattn.moe_route(logits, 2), logits, {"logits": S[0]}, [S[0], S[0]], {"logits": S[0]})
    flat = lambda result: (*result[:2], *result[2])  # noqa: E731
    check(mesh, lambda logits: fastattn.moe_route(logits, 2, return_plan=True), logits, {"logits": S[0]}, tensors_of=flat)
    counts = {"indices": torch.randint(4, (6, 2))}
    check(mesh, lambda indices: fastattn.moe_expert_counts(indices, 4), counts, {"indices": S[0]}, [SUM])
    plan = dict(zip(fastattn.MoEPlan._fields, fastattn.moe_dispatch(counts["indices"], 4)))

    def there_and_back(x, weights, **plan):
        plan = fastattn.MoEPlan(**plan)
        return fastattn.moe_combine(fastattn.moe_gather(x, plan), plan, weights)

    tensors = {"x": learn(6, 8), "weights": learn(6, 2), **plan}
    check(mesh, there_and_back, tensors, {"x": S[1]}, [S[1]], {"x": S[1], "weights": SUM})


@case
def products(mesh):
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    tensors = {"x": learn(6, 8), "w": learn(3, 4, 8), "bias": learn(3, 4), "offsets": offsets}
    cols, rows = {"w": S[1], "bias": S[1]}, {"x": S[1], "w": S[2]}
    check(mesh, fastattn.grouped_mm, tensors, cols, [S[1]], cols | {"x": SUM})
    del tensors["bias"]
    check(mesh, fastattn.grouped_mm, tensors, rows, [SUM], rows)


def mixture(transposed: bool, bias: bool) -> dict[str, Tensor]:
    tensors = {"x": learn(5, 8), "top_k_weights": learn(5, 2), "gate_up_proj": learn(3, 12, 8), "down_proj": learn(3, 8, 6)}
    if transposed:
        tensors |= {"gate_up_proj": learn(3, 8, 12), "down_proj": learn(3, 6, 8)}
    return tensors | {"top_k_index": torch.randint(3, (5, 2))} | ({"gate_up_bias": learn(3, 12), "down_bias": learn(3, 8)} if bias else {})


@case
def experts_by_their_intermediate_dim(mesh):
    for transposed in (False, True):
        sharded = {"gate_up_proj": S[2 if transposed else 1], "down_proj": S[1 if transposed else 2]}
        op = lambda transposed=transposed, **given: fastattn.moe(layout="interleaved", transposed=transposed, **given)  # noqa: E731
        check(mesh, op, mixture(transposed, False), sharded, [SUM], sharded | {"x": SUM, "top_k_weights": SUM})
        check(mesh, op, mixture(transposed, True), sharded | {"gate_up_bias": S[1]}, [SUM])
    check(mesh, fastattn.moe, mixture(False, True), {"gate_up_proj": S[1], "down_proj": S[2]})  # [gate; up] torn apart
