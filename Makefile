# Every target sets itself up: a virtual environment in .venv, the packages of requirements.txt, the built extension.
#
#   PYTHON=python3.12 make test      another interpreter for the virtual environment
#   CONSISTENCY_OPS_CUDA=0 make build  without CUDA kernels although nvcc is there (setup.py has the other switches)
#   make train ARGS="--data mnist --data-dir DIR"
#   make bench BENCH=precondition ARGS="--chunks 128"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?=
BIN := $(CURDIR)/$(VENV)/bin
LIBRARY := consistency_ops/_C.abi3.so
SOURCES := setup.py $(shell find csrc -type f)
# What the compilers say, without the command line of every file, which ninja prints.  A build in place is for this
# machine: one without a GPU compiles the kernels for sm_90a alone, in a third of the time.  Wheels and pip compile all.
COMPILE = set -o pipefail; command -v nvidia-smi > /dev/null || export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0a}"; \
	python setup.py -q build_ext --inplace | \
	{ grep --line-buffered -vE '^\[[0-9]+/[0-9]+\] |^ninja: no work' || true; }
# torch's libraries come with torch.  The tag is the lowest whose C library has every symbol that was linked.
REPAIR = auditwheel repair --exclude 'libtorch*.so*' --exclude 'libc10*.so*'
# The outer net: a test that hangs ends after this many seconds, more than the limits of tests/support/processes.py.
PYTEST = python -m pytest -q -n $(MAX_JOBS) --timeout 2000 --timeout-method thread
CXX_FILES = $(shell find csrc tests benchmarks -name build -prune -o \
	\( -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print)

SHELL := bash
export PATH := $(BIN):$(PATH)
export MAX_JOBS ?= 2
# OpenMP threads that spin while they wait make small steps many times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-slow test-nightly test-mutants test-all bench build wheel device docs lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(LIBRARY) ## train one network with SGD, Adam and the preconditioned method, side by side; results in runs/
	python -m consistency_ops train $(ARGS)

test: $(LIBRARY) ## the tests, ten to twenty minutes on two cores
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

test-slow: $(LIBRARY) $(addprefix $(VENV)/,.frameworks .docs .oracle .release .aarch64) ## long trainings, sanitizers, CUDA compilation, wheels, trainers of other people
	$(PYTEST) -m slow $(ARGS)

test-nightly: $(LIBRARY) ## the mutants of test-mutants; the bindings compiled with older torch; the longest of the slow tests
	$(PYTEST) -m nightly $(ARGS)

test-mutants: $(LIBRARY) ## every barrier of the CUDA kernels deleted, mistakes planted, one at a time: the tests must notice
	@status=0; $(PYTEST) -m nightly tests/simt/test_simt_mutants.py $(ARGS) || status=$$?; \
		sed '/^| seconds/,$$d' build/simt/mutants.md; exit $$status

test-all: test test-slow ## the tests and the slow ones

bench: $(LIBRARY) ## speed against torch in one table; BENCH="step memory peers" for all sizes of some, stored as JSON
	@test -n "$(BENCH)" || python -m benchmarks.micro $(ARGS)
	@set -e; for name in $(BENCH); do \
		if [ $$name = peers ]; then python -m benchmarks.peers --quick; \
		else python -m benchmarks.micro.bench_$$name $(ARGS); fi; done

build: $(VENV)/.installed ## compile the extension in place, only what changed
	@$(COMPILE)

wheel: $(VENV)/.release ## dist/*.whl: one abi3 wheel for every Python >= 3.10 and torch >= 2.10, checked as PyPI would
	@rm -rf build/lib* build/bdist* build/wheel
	@CONSISTENCY_OPS_TORCH_ABI=0 python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel .
	@mkdir -p dist
	@if [ "$$(uname)" = Linux ]; then $(REPAIR) --wheel-dir dist build/wheel/*.whl 2> build/wheel/repair.txt || \
		{ cat build/wheel/repair.txt; exit 1; }; else cp build/wheel/*.whl dist; fi
	@wheel=$$(ls -t dist/*.whl | head -n 1); twine check --strict "$$wheel" && abi3audit --strict "$$wheel" && \
		check-wheel-contents "$$wheel" && ls "$$wheel"

device: $(LIBRARY) ## what benchmarks/device_run.sh carries to a GPU: the library, and the golden vectors' program for sm_90a
	@mkdir -p build/device
	nvcc -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include -o build/device/golden tests/golden/golden.cu

docs: $(LIBRARY) $(VENV)/.docs ## the manual as web pages, build/docs/index.html; a warning is an error
	python -m sphinx -q -W --keep-going -j auto -b html docs build/docs

lint: $(VENV)/.installed ## ruff, clang-format, mypy, import-linter and pyright, changing nothing
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	@mkdir -p build
	@PYTHONPATH=. pyright --verifytypes consistency_ops --ignoreexternal > build/verifytypes.txt || \
		{ cat build/verifytypes.txt; exit 1; }
	@clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed ## ruff and clang-format, in place
	ruff check --fix .
	ruff format .
	@clang-format -i $(CXX_FILES)

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist *.egg-info $(LIBRARY) consistency_ops/_torch_abi_* .pytest_cache .ruff_cache .hypothesis .benchmarks

$(LIBRARY): $(VENV)/.installed $(SOURCES)
	@echo "compiling the extension (a minute or more)"
	@$(COMPILE)

$(VENV)/.installed: requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$$($(PYTHON) --version) is too old: set PYTHON to Python 3.10 or newer, as in 'make PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }
	@test -x "$(BIN)/python" || $(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install -qq -r requirements.txt
	@touch $@

$(VENV)/.frameworks: requirements-frameworks.txt $(VENV)/.installed
	"$(BIN)/python" -m pip install -qq -r requirements-frameworks.txt
	@touch $@

$(VENV)/.oracle: requirements-oracle.txt $(VENV)/.installed
	"$(BIN)/python" -m pip install -qq --no-deps -r requirements-oracle.txt
	@touch $@

$(VENV)/.release: requirements-release.txt $(VENV)/.installed
	"$(BIN)/python" -m pip install -qq -r requirements-release.txt
	@touch $@

# A compiler and an emulator for aarch64, where they can be installed; where not, the test that wants them says so.
$(VENV)/.aarch64: $(VENV)/.installed
	@if command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing g++-aarch64-linux-gnu and qemu-user"; \
		(apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
			g++-aarch64-linux-gnu qemu-user) > $@.log 2>&1 && touch $@ || tail -n 2 $@.log; fi

$(VENV)/.docs: requirements-docs.txt $(VENV)/.installed
	"$(BIN)/python" -m pip install -qq -r requirements-docs.txt
	@touch $@
