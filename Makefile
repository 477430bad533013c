# Logic lives in Python; these are names for it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := build/tools

.DEFAULT_GOAL := help
.PHONY: setup check test demo parent compile report build-images test-images sbom audit help

setup: $(STAMP) ## make .venv with exactly the pinned packages (done once; again when the pins change)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 --editable '.[dev]'
	touch $(STAMP)

check: $(STAMP) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/unit/test_imports.py

test: $(STAMP) ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu"

demo: $(STAMP) ## compress the tiny reasoner, search and recovery (FAST=1: a short form); run again to go on after an interruption
	$(BIN)/moesaic run compress --recipe tiny_cpu $(if $(FAST),--fast) --output runs/demo$(if $(FAST),-fast)

parent: $(STAMP) ## train the tiny reasoner anew (about 80 minutes on one core; resumes) and measure it
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.tiny_reasoner.train --out runs/parent
	$(BIN)/python -m examples.tiny_reasoner.export --run runs/parent
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.tiny_reasoner.record --run runs/parent

compile: $(STAMP) ## compile the pipelines into manifests/
	$(BIN)/python -m pipelines.compiling

report: $(STAMP) ## show the outcome of the last demo
	$(BIN)/moesaic report runs/demo

build-images: $(STAMP) ## build all images; ENGINE=docker|podman|buildah, REGISTRY=host/path pushes and writes the lock, VERSION=
	$(BIN)/python -m images.build $(if $(ENGINE),--engine $(ENGINE)) $(if $(REGISTRY),--registry $(REGISTRY)) \
		$(if $(VERSION),--version $(VERSION))

test-images: $(STAMP) ## build one image for real and run components in it (root; Debian's buildah, crun, mmdebstrap)
	$(BIN)/python benchmarks/image_build.py

sbom: $(STAMP) $(TOOLS)/.installed ## bills of materials (CycloneDX) of the environment and of each image, in build/sbom
	$(BIN)/python -m images.inventory sbom --tools $(TOOLS)/bin

audit: $(STAMP) $(TOOLS)/.installed ## look up every pin's known vulnerabilities; SERVICE=pypi|osv, OSV_URL= a server of your own
	$(BIN)/python -m images.inventory audit --tools $(TOOLS)/bin $(if $(SERVICE),--service $(SERVICE)) \
		$(if $(OSV_URL),--service osv --osv-url $(OSV_URL))

$(TOOLS)/.installed: images/tools.txt
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --no-deps --requirement images/tools.txt
	touch $@

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
