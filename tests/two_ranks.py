"""Two ranks of gloo, started once for all cases: a program that writes each case's failure, or nothing, to a file.

    python tests/two_ranks.py OUT [CASE …]

A case is a function of the device mesh. Both ranks run all of them in order, from the same seeds; a case fails if it fails on either.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RANKS = 2
CASES: dict[str, Callable[[DeviceMesh], None]] = {}


def case(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CASES[function.__name__] = function
    return function


def equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Of float32, summed in another order perhaps."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda message: f"{what}: {message}")


def load_cases() -> dict[str, Callable[[DeviceMesh], None]]:
    for module in ("dtensor_cases", "parallel_cases"):
        importlib.import_module(module)
    return CASES


def _run(rank: int, folder: str, names: list[str]) -> None:
    from fastattn.integrations import dtensor

    torch.set_num_threads(1)
    cases, failures = load_cases(), {}
    timeout = datetime.timedelta(seconds=60)  # of a rank whose other one has failed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    mesh = init_device_mesh("cpu", (RANKS,))
    dtensor.register()
    for name in names or cases:
        torch.manual_seed(0)
        try:
            cases[name](mesh)
            failures[name] = ""
        except Exception:
            failures[name] = f"rank {rank}: {traceback.format_exc()}"
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()  # a rank that leaves while the other still talks to it takes that one down
    dist.destroy_process_group()


def main(out: str | Path, *names: str) -> None:
    """Run the named cases, or all; what failed of each to `out`, as JSON."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (folder, names), RANKS)
        of_ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    Path(out).write_text(json.dumps({name: "\n".join(filter(None, (of[name] for of in of_ranks))) for name in of_ranks[0]}))


if __name__ == "__main__":
    import two_ranks  # by its name, under which cases know it

    two_ranks.main(*sys.argv[1:])
