"""The processes that train together: one, or as many as torchrun started, with the parameters sharded over them by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .transformer import Block


@dataclass(frozen=True)
class Ranks:
    """rank: this process, of `world`. device: its own."""

    rank: int
    world: int
    device: torch.device

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks: the same, bit for bit, on all of them."""
        if self.world == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def shard(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Shard the parameters, their gradients and what the optimizer keeps, block by block; each rank starts from the same ones.
        `model.loss` gathers them. dtype: what is computed in, and gathered; gradients are summed in float32."""
        if self.world == 1:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in blocks(model):
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        register_fsdp_forward_method(model, "loss")

    def reshard(self, model: nn.Module) -> None:
        """Give up what a forward without a backward has left gathered, which the optimizer does not know."""
        if self.world > 1:
            model.reshard()


@contextmanager
def ranks(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Those that torchrun started, each with a GPU of its own where there is one; else this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """All of a tensor on the CPU, put together where it is sharded: then each rank has to ask. None for one that does not keep it."""
    full = getattr(tensor, "full_tensor", lambda: tensor)()
    return full.detach().cpu() if keep else None


def as_sharded(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor, alike on each rank, as what belongs to a parameter lies: on its device, this rank's part. The optimizer's count of
    steps, a number, stays."""
    if tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def blocks(model: nn.Module) -> Sequence[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]
