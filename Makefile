# Logic lives in Python; these are names for it.
# The oldest Python that is supported and there; PYTHON= names another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := build/tools

# What one process of many has compiled, the next one finds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: setup check test test-engine test-cluster demo parent records compile build-images sbom audit pins check-pins help

setup: $(STAMP) ## make .venv with the pinned packages, once; PYTHON=python3.12, TORCH=cpu|cuda choose

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt images/environment.py src/moesaic/core/virtual_environment.py
	@test -n "$(PYTHON)" || { echo "error: set-up: no Python 3.11, 3.12 or 3.13 is on the PATH; install one, or name it: make setup PYTHON=/path/to/python" >&2; exit 2; }
	@PYTHONPATH=src $(PYTHON) -m images.environment $(VENV) $(if $(TORCH),--torch $(TORCH))

check: $(STAMP) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/core/test_imports.py

test: $(STAMP) ## all tests that need neither a GPU nor an engine nor a cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not gpu and not engine and not cluster"

test-engine: $(STAMP) ## vLLM, AIPerf and clients of the API, in environments of their own that are made once (3 GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m engine tests/costs tests/deploy tests/measure tests/recover tests/search

test-cluster: $(STAMP) ## overlays, rights, pipelines as pods, jobs and faults on the cluster that KUBECONFIG names (docs/cluster.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

demo: $(STAMP) ## compress the tiny reasoner, search and recovery (FAST=1: short; ENGINE=moesaic: without vLLM); run again to go on
	$(BIN)/moesaic run compress --recipe tiny_cpu_demo $(if $(FAST),--fast) $(if $(ENGINE),--engine $(ENGINE)) \
		--output runs/demo$(if $(FAST),-fast)

parent: $(STAMP) ## train the tiny reasoner anew (about 80 minutes on one core; resumes) and measure it
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.tiny_reasoner.train --out runs/parent
	$(BIN)/python -m examples.tiny_reasoner.export --run runs/parent
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.tiny_reasoner.record --run runs/parent

records: $(STAMP) ## run the small benchmarks again and say which published number no longer holds (NAMES="h100_search ...")
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/again.py $(NAMES)

compile: $(STAMP) ## write the components from the stages' declarations, compile the pipelines into the package
	$(BIN)/python -m components.generate
	$(BIN)/python -m pipelines.compiling

build-images: $(STAMP) ## build all images; ENGINE=docker|podman|buildah, REGISTRY=host/path pushes and writes the lock, VERSION=, ONLY=name
	$(BIN)/python -m images.build $(if $(ENGINE),--engine $(ENGINE)) $(if $(REGISTRY),--registry $(REGISTRY)) \
		$(if $(VERSION),--version $(VERSION)) $(if $(ONLY),--only $(ONLY))

sbom: $(STAMP) $(TOOLS)/.installed ## bills of materials (CycloneDX) of the environment and of each image, in build/sbom
	$(BIN)/python -m images.inventory sbom --tools $(TOOLS)/bin

audit: $(STAMP) $(TOOLS)/.installed ## look up every pin's known vulnerabilities; SERVICE=pypi|osv, OSV_URL= a server of your own
	$(BIN)/python -m images.inventory audit --tools $(TOOLS)/bin $(if $(SERVICE),--service $(SERVICE)) \
		$(if $(OSV_URL),--service osv --osv-url $(OSV_URL))

pins: $(STAMP) $(TOOLS)/.installed ## resolve the pins anew; UPGRADE=1 takes the newest versions that the ranges allow
	$(BIN)/python -m images.pins renew --uv $(TOOLS)/bin/uv $(if $(UPGRADE),--upgrade)
	$(BIN)/python -m images.requirements

check-pins: $(STAMP) $(TOOLS)/.installed ## resolve the pins for every platform from the registry alone
	$(BIN)/python -m images.pins check --uv $(TOOLS)/bin/uv

$(TOOLS)/.installed: images/tools.txt
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --no-deps --requirement images/tools.txt
	touch $@

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
