"""Where a figure comes from: device, driver, clocks, versions, commit, command."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastattn

PACKAGES = (
    "triton", "numpy", "rich", "matplotlib", "transformers", "flash-attn", "flash-attn-4", "xformers", "liger-kernel", "quack-kernels",
    "flashinfer-python", "sonic-moe", "scattermoe", "apex", "vllm",
)  # fmt: skip
_CONSTANT = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
_VARYING = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything needed to judge a figure, as a JSON-ready dict. What this machine does not tell is None."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastattn", *sys.argv[1:]]),
        "commit": commit(),
        "changes": changes(),
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "device": device_details(device),
    }


def version(package: str) -> str | None:
    """The installed version, None where it is absent. Does not import the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_details(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": "cpu", "name": _cpu_name(), "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": _nvidia_smi(device, _CONSTANT),
    }


def device_state(device: torch.device) -> dict[str, Any]:
    """What may differ between the start and the end of a run, and is only ever read: a GPU's clocks, temperature and power; of a CPU, how
    many processes want it (the load of the last minute)."""
    if device.type == "cuda":
        return _nvidia_smi(device, _VARYING) or {}
    return {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_smi(device: torch.device, fields: Sequence[str]) -> dict[str, str] | None:
    """Fields of this device as nvidia-smi gives them now; None where there is no nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    # by UUID: nvidia-smi does not number devices as CUDA_VISIBLE_DEVICES does
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None else str(index)
    query = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={which}"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    values = [value.strip() for value in answer.stdout.split(",")]
    return dict(zip(fields, values)) if answer.returncode == 0 else None


def checkout() -> Path | None:
    """The repository this package runs from; None for an installed copy."""
    root = Path(fastattn.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() and (root / "benchmarks").is_dir() else None


def commit() -> str | None:
    """The checkout's commit, "+changes" behind it where files differ from it; else $COMMIT; else None."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get("COMMIT") or None
    return head.strip() + ("+changes" if changes() else "")


def changes() -> str | None:
    """A hash of how the checkout's files differ from the commit, so that two states of it can be told apart; None where they do not."""
    difference = _git("diff", "HEAD", "--", ".", ":(exclude)benchmarks/results")  # where a run itself may write
    return hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None


def _git(*arguments: str) -> str | None:
    """What git says about the checkout; None where there is no checkout, or no git."""
    root = checkout()
    if root is None or not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
