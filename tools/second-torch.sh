#!/usr/bin/env bash
# Import, interpret and compile under the versions that GPU machines run: torch 2.11.0 (its CUDA build), Triton 3.6.0, numpy below 2.4.
#   PYTHON=python3.12 tools/second-torch.sh [DIR]          (DIR: the virtual environment, kept for the next run; default .venv-second-torch)
# torch's CUDA build links against gigabytes of CUDA libraries that nothing here calls. Only the two that it calls while loading, the
# runtime and CUPTI, are installed; empty libraries of the right names and lazy binding stand in for the rest. No GPU is seen, none is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dir=${1:-.venv-second-torch}
log=$dir/install.log

skip() {
  echo "SKIPPED test-second-torch: $1"
  exit 0
}

need() { # a tool that CI installs, so that its absence is a failure there
  [ "${FASTATTN_REQUIRE_ALL:-}" != 1 ] || { echo "FAILED test-second-torch: needs $1"; exit 1; }
  skip "needs $1"
}

install() {
  "$dir/bin/python" -m pip install -q --disable-pip-version-check "$@" >>"$log" 2>&1 && return
  tail -n 5 "$log"
  skip "could not download and install $*"
}

if [ ! "$dir/ready" -nt tools/second-torch.sh ]; then
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || need "Linux on x86_64"
  command -v gcc >/dev/null || need gcc
  rm -rf "$dir"
  "$python" -m venv "$dir"
  install --no-deps torch==2.11.0
  install triton==3.6.0 "cuda-toolkit[cudart,cupti]==13.0.2" "numpy<2.4" "setuptools>=77,<82" wheel \
    filelock fsspec jinja2 networkx sympy typing-extensions pytest pytest-xdist hypothesis
  site=$("$dir/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  echo "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)" >"$site/aaa-lazy-binding.pth"
  for missing in $(ldd "$site"/torch/lib/*.so | awk '/not found/ {print $1}' | sort -u); do
    gcc -shared -fPIC -Wl,-soname,"$missing" -x c /dev/null -o "$site/torch/lib/$missing"
  done
  # The CUDA operators take minutes to compile, and have a test of their own below.
  FASTATTN_CUDA=0 "$dir/bin/python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .
  touch "$dir/ready"
fi

unset TRITON_INTERPRET
"$dir/bin/python" -c "
import fastattn, torch, triton
from fastattn.extensions import cpu_operators
assert cpu_operators.why_not is None, cpu_operators.why_not  # built against this torch
print('torch', torch.__version__, 'triton', triton.__version__, 'cuda', torch.version.cuda, 'gpu', torch.cuda.is_available())"

# The two processes of `make test`, over what depends on the versions: every option in the interpreter, compilation by Triton for
# every part and by torch.compile, and the tools that patch Triton's insides.
pytest=("$dir/bin/python" -m pytest -q -p no:cacheprovider -n 2)
export OMP_NUM_THREADS=1
TRITON_INTERPRET=1 "${pytest[@]}" -m "interpret and not more" \
  tests/test_testing_checker.py tests/test_attention_op_interpret.py tests/test_attention.py::test_features
"${pytest[@]}" -m "not interpret and not more and not gpu" \
  tests/test_testing_stub_driver.py tests/test_testing_sass.py tests/test_launch_path.py tests/test_attention_op.py tests/test_extension.py
rows=(tests/test_{softmax,norm,rotary,glu,cross_entropy,linear_cross_entropy,sampling,merge_attention,append_paged_kv,paged_attention,moe_routing,grouped_mm,moe}.py)
TRITON_INTERPRET=1 "${pytest[@]}" -m "(interpret or both) and not more" -k "values or operator or order" "${rows[@]}"
"${pytest[@]}" -m "not interpret and not more and not gpu" -k "operator or cuda or compile or values" "${rows[@]}"

# A wheel that the first torch built has to run under this one.
if "$python" -c "import pytest, torch" 2>/dev/null; then
  FASTATTN_SECOND_TORCH=$(realpath -s "$dir/bin/python") "$python" -m pytest -q -p no:cacheprovider -rs tests/test_wheel.py -k "another_torch or cuda_torch"
fi
