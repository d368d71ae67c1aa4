#!/usr/bin/env bash
# Test and benchmark on a GPU machine that has its own torch; called by `make gpu`.
#   PYTHON  the interpreter to use as it is: needs torch and triton, whatever else is absent is named      (default python3)
#   OUT     where results go                                                                               (default benchmarks/results/local)
#   COMMIT  the commit to name in the results where there is no .git
# Nothing is downloaded, nothing is installed into that Python; build/ and OUT are written.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/local}
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
unset TRITON_INTERPRET
mkdir -p "$out"
out=$(cd "$out" && pwd)

"$python" - <<'PY'
import importlib.util
import sys

def absent(names):
    missing = []
    for name in names:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            found = False
        if not found:
            missing.append(name)
    return missing

required = absent(["torch", "triton"])
if required:
    sys.exit(f"make gpu: {sys.executable} has no {' and no '.join(required)}: set GPU_PYTHON to one that has")
import torch
import triton

device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}, {device}")
tools = ["numpy", "pytest", "hypothesis", "pytest_benchmark", "rich", "matplotlib", "transformers"]
peers = ["flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "liger_kernel", "quack", "flashinfer", "apex"]
peers += ["scattermoe", "sonicmoe", "triton_kernels.matmul", "vllm"]
print("absent, and done without:", ", ".join(absent(tools + peers)) or "nothing")
PY

# Install beside that Python, not into it, and keep the checkout off sys.path so that what runs is what was installed.
rm -rf build
if "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation --target build/gpu .; then
  export PYTHONPATH=$PWD/build/gpu${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
else
  echo "make gpu: the install failed (it needs pip, and setuptools 77 or newer): running the checkout itself"
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

tests=0
if "$python" -c "import pytest" 2>/dev/null; then
  "$python" -m pytest -m gpu 2>&1 | tee "$out/pytest-gpu.txt" || tests=$?
else
  echo "make gpu: no pytest here: the GPU tests were not run"
fi
bench=0
"$python" -m fastattn bench --suite quick --json "$out/bench.json" --html "$out/bench.html" || bench=$?
"$python" -m fastattn.benchmarks.next "$out/bench.json" --out "$out/next.md"
exit $((tests ? tests : bench))
