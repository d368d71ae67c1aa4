"""fastattn.nn under FSDP2 and tensor parallelism over two ranks: outputs and gradients are those of one rank."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from two_ranks import RANKS, case, equal

from fastattn.nn import GEGLU, Attention, LayerNorm, LinearCrossEntropyLoss, MoE, MultiheadAttention, RMSNorm, SwiGLU

SIZE = 16


def tables(seqlen: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(seqlen)[:, None] / 100 ** (torch.arange(0, 4, 2) / 4)
    return angles.cos(), angles.sin()


class Block(nn.Module):
    """A Llama layer with what Qwen3 and gpt-oss add to its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(SIZE), RMSNorm(SIZE)
        self.attn = Attention(SIZE, 4, 2, qk_norm=True, sinks=True, window=5)
        self.gate_proj, self.up_proj = (nn.Linear(SIZE, 24, bias=False) for _ in range(2))
        self.down_proj, self.act = nn.Linear(24, SIZE, bias=False), SwiGLU()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, x = self.mlp_norm(self.attn(self.attn_norm(x), cos, sin), x)
        return x + self.down_proj(self.act(self.gate_proj(y), self.up_proj(y)))


class Model(nn.Module):
    """One of each module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(11, SIZE), Block()
        self.mixture, self.bidirectional = MoE.mixtral(SIZE, 8, 4), MultiheadAttention(SIZE, 2, batch_first=True)
        self.up_proj, self.act, self.down_proj = nn.Linear(SIZE, 48), GEGLU(), nn.Linear(24, SIZE)
        self.norm, self.loss = LayerNorm(SIZE), LinearCrossEntropyLoss(SIZE, 11, reduction="sum")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.embedding(tokens), *tables(tokens.shape[1]))
        x = x + self.mixture(x)[0]
        x = x + self.bidirectional(x, x, x, need_weights=False)[0]
        return self.loss(self.norm(x + self.down_proj(self.act(self.up_proj(x)))), tokens)


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def equal_gradients(model: nn.Module, expected: nn.Module, scale: float = 1.0) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        equal(scale * full(parameter.grad), theirs[name].grad, name)


@case
def fsdp2(mesh: DeviceMesh) -> None:
    expected = Model()
    for parameter in expected.parameters():  # sinks and biases, too
        nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(expected)
    for module in (model.block, model.mixture, model.bidirectional, model.loss):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(11, (2 * RANKS, 6))
    loss = expected(tokens)
    loss.backward()
    mine = model(tokens.chunk(RANKS)[mesh.get_rank()])
    mine.backward()
    total = mine.detach().clone()
    torch.distributed.all_reduce(total)
    equal(total, loss, "loss")
    equal_gradients(model, expected, RANKS)  # FSDP averages over ranks
    torch.optim.AdamW(model.parameters(), 0.1).step()
    assert model(tokens[:1]).isfinite()


def sharded_block() -> tuple[Block, Block, Tensor, Tensor]:
    """A block, the one to shard, an input and the gradient of its output."""
    block = Block()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, copy.deepcopy(block), torch.randn(2, 6, SIZE, requires_grad=True), torch.randn(2, 6, SIZE)


@case
def tensor_parallel(mesh: DeviceMesh) -> None:
    """Between the modules of a block, plain tensors that all ranks have alike."""
    expected, block, x, dout = sharded_block()
    whole = (Replicate(),) * 3
    heads, of_heads = ColwiseParallel(use_local_output=False), SequenceParallel(sequence_dim=2, use_local_output=False)
    parallelize_module(block, mesh, {
        "attn": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        "attn.q_proj": heads, "attn.k_proj": heads, "attn.v_proj": heads, "attn.q_norm": of_heads, "attn.k_norm": of_heads,
        "attn.o_proj": RowwiseParallel(), "gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel(),
    })  # fmt: skip
    block.attn.sinks = nn.Parameter(distribute_tensor(block.attn.sinks, mesh, [Shard(0)]))
    compare(block, expected, x, dout, x.detach().requires_grad_(), tables(6))
    assert block.attn.q_proj.weight.grad.placements == block.attn.sinks.grad.placements == (Shard(0),)


@case
def sequence_parallel(mesh: DeviceMesh) -> None:
    """All of them DTensors, sharded by tokens between attention and the MLP: the norms' statistics, too."""
    expected, block, x, dout = sharded_block()
    tokens = {"input_layouts": Shard(1), "use_local_output": False}
    outs = {"output_layouts": Shard(1), "use_local_output": False}
    heads, of_heads = ColwiseParallel(**tokens), SequenceParallel(sequence_dim=2, use_local_output=False)
    parallelize_module(block, mesh, {
        "attn.q_proj": heads, "attn.k_proj": heads, "attn.v_proj": heads, "attn.q_norm": of_heads, "attn.k_norm": of_heads,
        "attn.o_proj": RowwiseParallel(**outs), "gate_proj": ColwiseParallel(**tokens), "up_proj": ColwiseParallel(**tokens),
        "down_proj": RowwiseParallel(**outs),
    })  # fmt: skip
    block.attn.sinks = nn.Parameter(distribute_tensor(block.attn.sinks, mesh, [Shard(0)]))
    for norm in (block.attn_norm, block.mlp_norm):
        distribute_module(norm, mesh)
    spread = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    whole = [distribute_tensor(t, mesh, [Replicate()]) for t in tables(6)]
    out = compare(block, expected, x, dout, spread, whole)
    assert out.placements == (Shard(1),)


def compare(block: nn.Module, expected: nn.Module, x: Tensor, dout: Tensor, mine: Tensor, cos_sin: object) -> Tensor:
    theirs = expected(x, *tables(6))
    theirs.backward(dout)
    out = block(mine, *cos_sin)
    equal(full(out), theirs, "out")
    out.backward(distribute_tensor(dout, out.device_mesh, out.placements) if isinstance(out, DTensor) else dout)
    equal(full(mine.grad), x.grad, "dx")
    equal_gradients(block, expected)
    return out


@case
def experts_tensor_parallel(mesh: DeviceMesh) -> None:
    """gpt-oss's, whose gates and ups are interleaved: each rank has a part of every expert."""
    expected = MoE.gpt_oss(SIZE, 8, 4, 2)
    layer = copy.deepcopy(expected)
    placements = {"gate_up_proj": Shard(2), "gate_up_proj_bias": Shard(1), "down_proj": Shard(1)}

    def shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(parameter.detach(), mesh, [placements.get(key, Replicate())])
            module.register_parameter(key, nn.Parameter(spread))

    distribute_module(layer, mesh, shard)
    x = torch.randn(2, 3, SIZE)
    out, aux = expected(x)
    (out.square().sum() + aux.load_balancing_loss + aux.z_loss).backward()
    mine, spread_aux = layer(distribute_tensor(x, mesh, [Replicate()]))
    equal(mine.full_tensor(), out, "out")
    (mine.square().sum() + spread_aux.load_balancing_loss + spread_aux.z_loss).backward()
    equal_gradients(layer, expected)


@case
def multihead_attention_by_batch(mesh: DeviceMesh) -> None:
    expected = MultiheadAttention(SIZE, 4, batch_first=True)
    layer = distribute_module(copy.deepcopy(expected), mesh)
    x = torch.randn(4, 5, SIZE)
    out = expected(x, x, x, need_weights=False)[0]
    spread = distribute_tensor(x, mesh, [Shard(0)])
    mine = layer(spread, spread, spread, need_weights=False)[0]
    assert mine.placements == (Shard(0),)
    equal(mine.full_tensor(), out, "out")
    out.square().sum().backward()
    mine.square().sum().backward()
    equal_gradients(layer, expected)
