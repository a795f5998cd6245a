# Everything sets itself up: a virtual environment per Python, the build, the dependencies.
#   make demo     real Gemma 3 270M weights, offloading on against off
#   make test     the whole test suite
#   make fuzz     random runs of the connector against its reference model; FUZZ_STEPS=50_000_000 for long
#   make bench    copies, latency, serving, memory and decisions beside the alternatives; under three minutes
#   make bench-scheduler  what the connector's decisions cost a serving loop
#   make bench-retention  how many prompts a host pool can serve, with and without retention
#   make test-families   tests against the packages that allocate caches: flax, MaxText, gemma and others
#   make test-gpu-compiler  what XLA's GPU compiler makes of the ops for an H100; needs no GPU
#   make test-cuda  tests and benchmark on an NVIDIA GPU, with a report in gpu-report/; wants nvcc; JAX_CUDA=cuda12 for that one
#   make mutants  which changes to connector and offload no test notices; MUTANTS='jaxkv.offload.claims*' for some
# PYTHON=python3.12 picks another interpreter; VENV=dir another environment.

PYTHON ?= python3
VENV ?= .venv
FUZZ_STEPS ?= 500_000
FUZZ_FIRST_SEED ?= 0
FUZZ_JOBS ?= 2
MUTANTS ?=
FAMILIES_VENV ?= .venv-families
GPU_COMPILER_VENV ?= .venv-gpu-compiler
CUDA_VENV ?= .venv-cuda
JAX_CUDA ?= cuda13
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
WHEELS := build/wheels
# Installs jaxkv alone and leaves in $$wheel what to install extras of: the wheel is built once for all environments
# of a Python. Pip has to be forced, as one of the same version may be there.
INSTALL_JAXKV = soabi=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))') && \
	$(MAKE) --no-print-directory VENV=$(VENV) $(WHEELS)/$$soabi/.built && \
	wheel=$$(echo $(WHEELS)/$$soabi/*.whl) && \
	$(PIP) install --no-deps --force-reinstall "$$wheel"
SOURCES := pyproject.toml README.md LICENSE $(shell find jaxkv ffi examples -type f \
	-not -name '*.pyc' -not -path '*/__pycache__/*')
CPP := $(shell find ffi -name '*.cc' -o -name '*.cu' -o -name '*.h')

.PHONY: help demo bench bench-scheduler bench-retention test fuzz test-families run-families \
	test-gpu-compiler run-gpu-compiler test-cuda run-cuda mutants lint format docs native-test clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.jaxkv
	$(BIN)/jaxkv demo

bench: $(VENV)/.jaxkv
	$(BIN)/jaxkv bench all

bench-scheduler: $(VENV)/.jaxkv
	$(BIN)/jaxkv bench scheduler

bench-retention: $(VENV)/.jaxkv
	$(BIN)/jaxkv bench retention

test: $(VENV)/.jaxkv
	@echo "== pytest, $$($(BIN)/python --version), jax $$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	$(BIN)/pytest -n auto --dist loadfile

fuzz: $(VENV)/.jaxkv
	$(BIN)/python tests/fuzz_cache.py --steps $(FUZZ_STEPS) --first-seed $(FUZZ_FIRST_SEED) --jobs $(FUZZ_JOBS)

mutants: $(VENV)/.jaxkv $(VENV)/.mutants
	mkdir -p mutants/jaxkv
	cp $$($(BIN)/python -P -c 'import jaxkv._native; print(jaxkv._native.__file__)') mutants/jaxkv/
	PATH=$(abspath $(BIN)):$$PATH mutmut run $(MUTANTS)
	$(BIN)/mutmut results | sed -E '/not checked|caught by type check/d'

test-families:
	@$(MAKE) --no-print-directory run-families VENV=$(FAMILIES_VENV)

run-families: $(VENV)/.families
	@echo "== cache families, $$($(BIN)/python --version), jax $$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	$(BIN)/pytest -n auto --dist loadfile tests/families

test-gpu-compiler:
	@$(MAKE) --no-print-directory run-gpu-compiler VENV=$(GPU_COMPILER_VENV)

run-gpu-compiler: $(VENV)/.gpu-compiler
	@echo "== GPU compiler, $$($(BIN)/python --version), jax $$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	JAX_PLATFORMS=cpu JAXKV_REQUIRE_GPU_COMPILER=1 $(BIN)/pytest -n auto tests/gpu_compiler

test-cuda:
	@$(MAKE) --no-print-directory run-cuda VENV=$(CUDA_VENV)

run-cuda: $(VENV)/.cuda
	$(BIN)/python tests/cuda/gpu_report.py --output gpu-report

lint: $(VENV)/.jaxkv $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

native-test: $(VENV)/.lint
	@for sanitizers in address,undefined thread; do \
		build=build/native-$${sanitizers%%,*}; \
		$(BIN)/cmake -S ffi -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
			-DCMAKE_BUILD_TYPE=RelWithDebInfo -DJAXKV_PYTHON_MODULE=OFF -DJAXKV_NATIVE_TESTS=ON \
			-DJAXKV_SANITIZE=$$sanitizers >/dev/null && \
		$(BIN)/cmake --build $$build && \
		$(BIN)/ctest --test-dir $$build --output-on-failure --parallel 2 || exit 1; \
	done

docs: $(VENV)/.jaxkv $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxkv needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "this Python cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "no C++ compiler found; on Debian: apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	@touch $@

$(WHEELS)/%/.built: $(SOURCES)
	@echo "== building jaxkv, $*"
	rm -f $(@D)/*.whl
	$(PIP) wheel --no-deps --wheel-dir $(@D) .
	@touch $@

$(VENV)/.jaxkv: $(VENV)/.python $(SOURCES)
	@echo "== installing jaxkv and what it needs into $(VENV)"
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[demo,test]"
	@touch $@

$(VENV)/.families: $(VENV)/.python $(SOURCES) $(wildcard tests/families/requirements*.txt)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "these packages need Python 3.12 or newer; try make test-families PYTHON=python3.12"; exit 1; }
	@echo "== installing jaxkv and the packages it is tested against into $(VENV)"
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[test]" -r tests/families/requirements.txt
	$(PIP) install --no-deps -r tests/families/requirements-no-deps.txt
	@touch $@

$(VENV)/.gpu-compiler: $(VENV)/.python $(SOURCES) tests/gpu_compiler/requirements.txt
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "the GPU compiler needs Python 3.12 or newer; try make test-gpu-compiler PYTHON=python3.12"; exit 1; }
	@echo "== installing jaxkv and XLA's GPU compiler into $(VENV)"
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[test]" -r tests/gpu_compiler/requirements.txt
	@touch $@

$(VENV)/.cuda: $(VENV)/.python $(SOURCES)
	@command -v $${CUDACXX:-nvcc} >/dev/null || \
		{ echo "no nvcc found; install the CUDA toolkit and put it on PATH, or set CUDACXX to it"; exit 1; }
	@echo "== building jaxkv with its CUDA extension and installing JAX for $(JAX_CUDA) into $(VENV)"
	$(PIP) install ".[bench,test]" "jax[$(JAX_CUDA)]" --config-settings=cmake.define.JAXKV_CUDA=on
	@touch $@

$(VENV)/.lint: $(VENV)/.python pyproject.toml
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[lint]"
	@touch $@

$(VENV)/.mutants: $(VENV)/.python pyproject.toml
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[mutants]"
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	@$(INSTALL_JAXKV) && $(PIP) install "$$wheel[docs]"
	@touch $@

clean:
	rm -rf .venv* build dist site mutants
