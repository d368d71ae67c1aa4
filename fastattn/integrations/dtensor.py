"""fastattn's operators on torch.distributed.tensor.DTensor: which of a tensor's dims may be sharded, and what comes out.

    from fastattn.integrations import dtensor
    dtensor.register()

A rule lists what an operator does shard by shard, without communication, to the numbers of one rank but for the order of sums over shards,
which are left partial. Whatever is asked beyond that (attention over a sharded sequence, a softmax along a sharded dim) DTensor first
redistributes to one of these. Nothing is registered at import. The rules are given to torch's experimental `register_sharding`, and so far
tested by two ranks of gloo on CPU tensors alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from fastattn.ops.attention import seed_of

# One way to shard over one mesh dim: placements of all results in order, and of the arguments that are not replicated, by name.
Sharding = tuple[list[Placement], dict[str, Placement]]
REPLICATED, SUMMED = Replicate(), Partial("sum")

RULES: dict[str, Callable[..., Iterator[Sharding]]] = {}


def register() -> None:
    """Give DTensor a rule for each operator in RULES. Calling it again changes nothing.

    Dropout draws a seed for each shard, and one for all ranks that hold the same shard.
    """
    for name, rule in RULES.items():
        operator = getattr(torch.ops.fastattn, name).default
        register_sharding(operator)(_shardings_of(operator, rule))
        # register_sharding keys its cache by what follows the first int; here flags and strings decide what comes out, too.
        arguments = operator._schema.arguments
        first = next((i for i, arg in enumerate(arguments) if "Tensor" not in str(arg.type)), len(arguments))
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)
    seed_of[DTensor] = _draw_seed


def _shardings_of(operator: torch._ops.OpOverload, rule: Callable[..., Iterator[Sharding]]) -> Callable:
    """The rule as `register_sharding` wants it, with what always holds: all of it replicated."""
    names = [arg.name for arg in operator._schema.arguments]
    all_replicated = [REPLICATED] * len(operator._schema.returns), {}

    def shardings(*args: Any) -> list[tuple[list, list]]:
        given = dict(zip(names, args))
        return [
            (outs, [ins.get(name, REPLICATED) if _is_tensor(arg) else None for name, arg in given.items()])
            for outs, ins in (all_replicated, *rule(**given))
        ]

    return shardings


def _rule(*operators: str) -> Callable:
    """Makes a function of an operator's arguments, by their names, its rule. Tensors come as specs, with shape, ndim and mesh."""

    def add(function: Callable[..., Iterator[Sharding]]) -> Callable[..., Iterator[Sharding]]:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return add


def _is_tensor(arg: Any) -> bool:
    return hasattr(arg, "placements")


def _if(given: Any, placement: Placement) -> Placement:
    """Of a result that is there if something was given or wanted, and empty if not."""
    return placement if given else REPLICATED


def _divides(size: int, mesh: torch.distributed.DeviceMesh) -> bool:
    """Whether all shards of a dim are equally long, over whichever dims of the mesh: groups of heads must not be torn apart."""
    subsets = itertools.chain.from_iterable(itertools.combinations(mesh.shape, n) for n in range(1, mesh.ndim + 1))
    # More shards than there are entries DTensor does not consider.
    return all(size % parts == 0 for parts in map(math.prod, subsets) if parts <= size)


def _draw_seed(like: DTensor) -> DTensor:
    """A dropout seed of `like`'s shards: each its own, (1,) of a tensor with as many, so that their masks have nothing in common, though
    ranks may be seeded alike."""
    mesh, shard = like.device_mesh, 0
    placements = [p if isinstance(p, Replicate) else Shard(0) for p in like.placements]
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate() or [], placements):
        shard = shard if isinstance(placement, Replicate) else shard * size + place
    local = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device) + shard
    return DTensor.from_local(local, mesh, placements, run_check=True)  # which has one rank's reach all that hold the shard


# --------------------------------------------------------------------------------------------------------------------
# Attention: batches and heads.


def _heads_dim(q: Any) -> tuple[int, int]:
    """The dim of the heads in q and in the log-sum-exp, dense or packed."""
    return (2, 1) if q.ndim == 4 else (1, 0)


def _along(t: Any, dim: int, size: int) -> Placement:
    """Of a bias or slopes that may be broadcast along that dim."""
    return Shard(dim) if t is not None and size > 1 and t.shape[dim] == size else REPLICATED


def _attention_inputs(q, k, attn_bias, alibi_slopes) -> Iterator[dict[str, Placement]]:
    """Where q, k, v and all that belongs to them may be: by batches, by heads, and with one key head by query heads alone."""
    seed = {"dropout_seed": Shard(0)}
    if q.ndim == 4:
        slopes = Shard(0) if alibi_slopes is not None and alibi_slopes.ndim == 2 else REPLICATED
        extra = {"attn_bias": _along(attn_bias, 0, q.shape[0]), "alibi_slopes": slopes}
        yield dict.fromkeys(("q", "k", "v", "lse", "out", "dout", "dlse", "weights"), Shard(0)) | extra | seed
    heads, lse_heads = _heads_dim(q)
    num_heads, num_kv_heads = q.shape[heads], k.shape[heads]
    extra = {
        "attn_bias": _along(attn_bias, 1, num_heads),
        "alibi_slopes": REPLICATED if alibi_slopes is None else Shard(alibi_slopes.ndim - 1),
        "sinks": Shard(0),
    }
    of_queries = dict.fromkeys(("q", "out", "dout"), Shard(heads)) | dict.fromkeys(("lse", "dlse"), Shard(lse_heads))
    of_queries |= {"weights": Shard(1)} | extra | seed
    if _divides(num_kv_heads, q.mesh):
        yield of_queries | {"k": Shard(heads), "v": Shard(heads)}
    if num_kv_heads == 1 < num_heads:
        yield of_queries


@_rule("attention_fwd")
def _attention_fwd(q, k, attn_bias, alibi_slopes, keep_weights, **_) -> Iterator[Sharding]:
    for ins in _attention_inputs(q, k, attn_bias, alibi_slopes):
        yield [ins["out"], ins["lse"], _if(keep_weights, ins["weights"])], ins


@_rule("attention_bwd")
def _attention_bwd(q, k, attn_bias, alibi_slopes, sinks, bias_grad, **_) -> Iterator[Sharding]:
    def summed_unless_sharded(placement: Placement) -> Placement:
        return SUMMED if placement == REPLICATED else placement

    for ins in _attention_inputs(q, k, attn_bias, alibi_slopes):
        grads_kv = [summed_unless_sharded(ins.get(name, REPLICATED)) for name in ("k", "v")]
        dbias, dsinks = (summed_unless_sharded(ins.get(name, REPLICATED)) for name in ("attn_bias", "sinks"))
        yield [ins["q"], *grads_kv, _if(bias_grad, dbias), _if(sinks is not None, dsinks)], ins


@_rule("paged_attention")
def _paged_attention(q, k_cache, cu_seqlens_q, alibi_slopes, **_) -> Iterator[Sharding]:
    heads, lse_heads = _heads_dim(q)
    if cu_seqlens_q is None:
        ins = dict.fromkeys(("q", "page_table", "seqlens_k", "leftpad"), Shard(0))
        if alibi_slopes is not None and alibi_slopes.ndim == 2:
            ins["alibi_slopes"] = Shard(0)
        yield [Shard(0), Shard(0)], ins
    if _divides(k_cache.shape[2], q.mesh):
        ins = {"q": Shard(heads), "k_cache": Shard(2), "v_cache": Shard(2)} | dict.fromkeys(("sinks", "k_scale", "v_scale"), Shard(0))
        if alibi_slopes is not None:
            ins["alibi_slopes"] = Shard(alibi_slopes.ndim - 1)
        yield [Shard(heads), Shard(lse_heads)], ins


@_rule("merge_attention_fwd")
def _merge_attention_fwd(outs, **_) -> Iterator[Sharding]:
    for dim, lse_dim in _merged_dims(outs):
        yield [Shard(dim - 1), Shard(lse_dim - 1)], {"outs": Shard(dim), "lses": Shard(lse_dim)}


@_rule("merge_attention_bwd")
def _merge_attention_bwd(outs, **_) -> Iterator[Sharding]:
    for dim, lse_dim in _merged_dims(outs):
        ins = {"outs": Shard(dim), "lses": Shard(lse_dim), "dout": Shard(dim - 1), "dlse": Shard(lse_dim - 1)}
        yield [Shard(dim), Shard(lse_dim)], ins


def _merged_dims(outs: Any) -> list[tuple[int, int]]:
    """Of (N, B, S, H, D) and (N, B, H, S), or packed (N, T, H, D) and (N, H, T): all but the partials and D."""
    return [(1, 1), (2, 3), (3, 2)] if outs.ndim == 5 else [(1, 2), (2, 1)]


@_rule("rotary")
def _rotary(q, k, cos, positions, cu_seqlens, **_) -> Iterator[Sharding]:
    heads, _ = _heads_dim(q)
    # Each head alone; one of the two may have too few of them, or none.
    for sharded in (("q", "k"), ("q",), ("k",)):
        yield [Shard(heads) if name in sharded else REPLICATED for name in ("q", "k")], dict.fromkeys(sharded, Shard(heads))
    both = {"q": Shard(0), "k": Shard(0)}
    if q.ndim == 4:
        tables = _along(cos, 0, q.shape[0]) if cos.ndim == 3 else REPLICATED
        yield [Shard(0), Shard(0)], both | {"cos": tables, "sin": tables, "positions": _along(positions, 0, q.shape[0])}
    # Tokens, where they say their positions.
    if positions is not None and cu_seqlens is None:
        tokens = Shard(q.ndim - 3)
        yield [tokens, tokens], {"q": tokens, "k": tokens, "positions": tokens}


# --------------------------------------------------------------------------------------------------------------------
# Rows: any dim but the one that an op runs along.


@_rule("softmax_fwd")
def _softmax_fwd(x, dim, **_) -> Iterator[Sharding]:
    for d in range(x.ndim):
        if d != dim:
            yield [Shard(d)], {"x": Shard(d)}


@_rule("softmax_bwd")
def _softmax_bwd(y, dim, **_) -> Iterator[Sharding]:
    for d in range(y.ndim):
        if d != dim:
            yield [Shard(d)], {"dy": Shard(d), "y": Shard(d)}


@_rule("norm_fwd")
def _norm_fwd(x, residual, **_) -> Iterator[Sharding]:
    for d in range(x.ndim - 1):
        ins = {"x": Shard(d), "residual": Shard(d), "dropout_seed": Shard(0)}
        yield [Shard(d), _if(residual is not None, Shard(d)), Shard(d + 1)], ins


@_rule("norm_bwd")
def _norm_bwd(h, add, dropout_p, dtype, weight_grad, bias_grad, **_) -> Iterator[Sharding]:
    has_dx = not (add and dropout_p == 0.0 and dtype == h.tensor_meta.dtype)
    for d in range(h.ndim - 1):
        ins = dict.fromkeys(("dy", "dh", "h"), Shard(d)) | {"stats": Shard(d + 1), "dropout_seed": Shard(0)}
        yield [_if(has_dx, Shard(d)), _if(add, Shard(d)), _if(weight_grad, SUMMED), _if(bias_grad, SUMMED)], ins


@_rule("glu_fwd")
def _glu_fwd(gate, up, **_) -> Iterator[Sharding]:
    for d in range(gate.ndim - (up is None)):
        yield [Shard(d)], {"gate": Shard(d), "up": Shard(d)}


@_rule("glu_bwd")
def _glu_bwd(gate, up, **_) -> Iterator[Sharding]:
    for d in range(gate.ndim - (up is None)):
        yield [Shard(d), _if(up is not None, Shard(d))], {"dout": Shard(d), "gate": Shard(d), "up": Shard(d)}


@_rule("sampling_probs")
def _sampling_probs(**_) -> Iterator[Sharding]:
    yield [Shard(0)], dict.fromkeys(("logits", "temperatures", "top_ks", "top_ps", "min_ps"), Shard(0))


# --------------------------------------------------------------------------------------------------------------------
# Losses: rows, but not for a mean, which no shard knows the divisor of.


def _of_rows(reduction: str) -> list[Placement]:
    return {"none": [Shard(0)], "sum": [SUMMED], "mean": []}[reduction]


@_rule("cross_entropy_fwd")
def _cross_entropy_fwd(target, reduction, return_lse, **_) -> Iterator[Sharding]:
    if target.ndim == 1:  # of more dims, numbers holds the rows in one
        for loss in _of_rows(reduction):
            yield [loss, _if(return_lse, Shard(0)), REPLICATED, Shard(1)], {"input": Shard(0), "target": Shard(0)}


@_rule("cross_entropy_bwd")
def _cross_entropy_bwd(dloss, target, **_) -> Iterator[Sharding]:
    if target.ndim == 1:
        yield [Shard(0)], _loss_inputs(dloss)


def _loss_inputs(dloss: Any) -> dict[str, Placement]:
    return dict.fromkeys(("dlse", "input", "target"), Shard(0)) | {"dloss": _if(dloss.ndim, Shard(0)), "numbers": Shard(1)}


@_rule("linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(reduction, return_lse, wanted, **_) -> Iterator[Sharding]:
    for loss in _of_rows(reduction):
        results = [loss, _if(return_lse, Shard(0)), REPLICATED, Shard(1), *_linear_grads(wanted)]
        yield results, {"input": Shard(0), "target": Shard(0)}


@_rule("linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(dloss, wanted, **_) -> Iterator[Sharding]:
    yield _linear_grads(wanted), _loss_inputs(dloss)


def _linear_grads(wanted: list[bool]) -> list[Placement]:
    return [_if(want, placement) for want, placement in zip(wanted, (Shard(0), SUMMED, SUMMED), strict=True)]


@_rule("linear_cross_entropy_scale")
def _linear_cross_entropy_scale(grad, **_) -> Iterator[Sharding]:
    for placement in (SUMMED, *map(Shard, range(grad.ndim))):
        yield [placement], {"grad": placement}


# --------------------------------------------------------------------------------------------------------------------
# Mixtures of experts: tokens are replicated, since a plan sorts all of them; products and hidden dims are sharded.


@_rule("moe_route_fwd")
def _moe_route_fwd(**_) -> Iterator[Sharding]:
    yield [Shard(0), Shard(0)], {"logits": Shard(0)}


@_rule("moe_route_dispatch", "moe_dispatch")
def _whole_plan(**_) -> Iterator[Sharding]:
    return iter(())


@_rule("moe_route_bwd")
def _moe_route_bwd(**_) -> Iterator[Sharding]:
    yield [Shard(0)], {"dweights": Shard(0), "logits": Shard(0), "indices": Shard(0)}


@_rule("moe_expert_counts")
def _moe_expert_counts(indices, **_) -> Iterator[Sharding]:
    for d in range(indices.ndim):
        yield [SUMMED], {"indices": Shard(d)}


@_rule("moe_gather_fwd")
def _moe_gather_fwd(**_) -> Iterator[Sharding]:
    yield [Shard(1)], {"x": Shard(1)}


@_rule("moe_combine_fwd")
def _moe_combine_fwd(**_) -> Iterator[Sharding]:
    yield [Shard(1)], {"y": Shard(1)}
    yield [SUMMED], {"y": SUMMED}


@_rule("moe_combine_bwd")
def _moe_combine_bwd(**_) -> Iterator[Sharding]:
    yield [Shard(1), SUMMED], {"dout": Shard(1), "y": Shard(1)}
    yield [REPLICATED, SUMMED], {"y": SUMMED}


@_rule("grouped_mm_fwd")
def _grouped_mm_fwd(**_) -> Iterator[Sharding]:
    yield [Shard(1)], {"w": Shard(1), "bias": Shard(1)}
    yield [SUMMED], {"x": Shard(1), "w": Shard(2), "bias": SUMMED}


@_rule("grouped_mm_bwd")
def _grouped_mm_bwd(wanted, **_) -> Iterator[Sharding]:
    want_x, want_w, want_bias = wanted
    yield [_if(want_x, SUMMED), _if(want_w, Shard(1)), _if(want_bias, Shard(1))], {"dout": Shard(1), "w": Shard(1)}
    yield [_if(want_x, Shard(1)), _if(want_w, Shard(2)), REPLICATED], {"x": Shard(1), "w": Shard(2)}


def _intermediate(gate_up_proj: Any, layout: str, transposed: bool) -> Iterator[dict[str, Placement]]:
    """Experts by their intermediate dim, each shard with its gates and their ups: not as [gate; up], whose halves hold one or the other.
    A bias of the sum is part of it, once."""
    gate_up_dim, down_dim = (2, 1) if transposed else (1, 2)
    if layout == "interleaved" and _divides(gate_up_proj.shape[gate_up_dim] // 2, gate_up_proj.mesh):
        yield {
            "gate_up_proj": Shard(gate_up_dim), "down_proj": Shard(down_dim), "gate_up_bias": Shard(1), "down_bias": SUMMED,
            "pre": Shard(1),
        }  # fmt: skip


@_rule("moe_fwd")
def _moe_fwd(gate_up_proj, layout, transposed, **_) -> Iterator[Sharding]:
    for ins in _intermediate(gate_up_proj, layout, transposed):
        yield [SUMMED, ins["pre"]], ins


@_rule("moe_bwd")
def _moe_bwd(gate_up_proj, layout, transposed, wanted, **_) -> Iterator[Sharding]:
    for ins in _intermediate(gate_up_proj, layout, transposed):
        grads = SUMMED, SUMMED, ins["gate_up_proj"], ins["down_proj"], ins["gate_up_bias"], REPLICATED
        yield [_if(want, placement) for want, placement in zip(wanted, grads, strict=True)], ins
