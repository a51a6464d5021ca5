# Enginehouse: serve · test · lint · format · protos · bench · examples · …  (make help)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPOSITORY ?= model_repository
FLAGS ?=
# CPU builds are pinned only where there is no NVIDIA driver: any other torch pulls gigabytes of CUDA packages.
CONSTRAINTS := $(if $(wildcard /dev/nvidia0 /proc/driver/nvidia/version),,-c constraints-cpu.txt)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS)
ONNX := $(if $(CONSTRAINTS),onnx,gpu)

.DEFAULT_GOAL := help
.PHONY: help install serve examples test test-unit lint types contracts format bench peer soak fuzz test-gpu
.PHONY: bench-gpu protos clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints-cpu.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Enginehouse and what the examples need into $(VENV) (the first time takes minutes)"
	@$(PIP) --upgrade pip wheel
	@if [ -n "$(CONSTRAINTS)" ]; then $(PIP) torch; fi
	@$(PIP) -e '.[$(ONNX),torch,llm,transformers,examples]'
	@touch $@

$(VENV)/installed-tests: $(VENV)/installed
	@echo "installing what the tests need"
	@$(PIP) -e '.[test,dev,redis,s3,transformers]'
	@touch $@

install: $(VENV)/installed  ## make the virtual environment and install the server into it

examples: install  ## build the example models
	@$(BIN)/python model_repository/build.py

serve: examples  ## build the examples and serve them (REPOSITORY=…, FLAGS=…)
	$(BIN)/enginehouse serve --model-repository=$(REPOSITORY) $(FLAGS)

test: $(VENV)/installed-tests examples  ## install what tests need and run them all
	@# A process for each group: they look at what is left of the processes and modules of their own.
	@for group in unit properties conformance faults fuzz acceptance; do \
	  echo "tests/$$group"; $(BIN)/python -m pytest -m "not peer and not gpu" tests/$$group || failed=1; \
	done; test -z "$$failed"

test-unit: $(VENV)/installed-tests  ## the fast tests alone
	$(BIN)/python -m pytest tests/unit tests/properties

lint: $(VENV)/installed-tests  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/installed-tests  ## mypy, strict
	$(BIN)/mypy

contracts: $(VENV)/installed-tests  ## which layer may import which
	$(BIN)/lint-imports

format: $(VENV)/installed-tests
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/installed-tests examples  ## requests a second beside a bare loop (and Triton, after `make peer`)
	$(BIN)/python -m tests.bench --report docs/benchmarks.md
	$(BIN)/python -m tests.bench.mixed_lengths
	$(BIN)/python -m tests.bench.length_policies
	$(BIN)/python tests/bench/execution_cost.py

peer: $(VENV)/installed-tests  ## install a real Triton beside us (build/peer) and compare with it
	$(BIN)/python -c "from tests.bench import triton_peer as peer; peer.is_installed() or peer.install()"
	$(BIN)/python -m pytest -m peer

soak: $(VENV)/installed-tests examples  ## half an hour and more of sequences and language models under fire
	$(BIN)/python -m tests.faults.soak
	$(BIN)/python -m tests.faults.llm_soak

fuzz: $(VENV)/installed-tests  ## a million bad requests
	$(BIN)/python -m tests.fuzz --requests=1000000

# With what is installed, as a CUDA machine may have no network: the virtual environment if there is one, else $(PYTHON).
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

test-gpu:  ## on a CUDA machine: everything of docs/gpu.md, in stages; results in build/gpu
	$(GPU_PYTHON) -m tests.gpu test

bench-gpu:  ## on a CUDA machine: speed beside the hardware's limits
	$(GPU_PYTHON) -m tests.gpu bench

protos: $(VENV)/installed-tests  ## regenerate the wire contract
	$(BIN)/python protos/generate.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
