# Everything is built inside this folder: .venvs/ (environments), .models/ (small models), build/ (logs, caches).
# PYTHON makes the environments; the targets then run inside them.
PYTHON ?= python3

DEV  := .venvs/dev/bin/python
VLLM := .venvs/vllm/bin/python
SGLANG := .venvs/sglang/bin/python
# Arguments for the script behind a target, as in: make bench-tier ARGS="--help"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang test faults lint format bench-tier bench-vllm bench-sglang env-dev env-vllm env-sglang clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env-vllm ## a real model in vLLM: cold prompt, restored prompt, same tokens (first run: about 5 minutes)
	@$(VLLM) tests/environments/models.py smollm2
	@$(VLLM) -m benchmarks.demo $(ARGS)

demo-sglang: env-sglang ## the same in SGLang, beside SGLang's own file backend (about 15 minutes)
	@$(SGLANG) -m tests.environments.models smollm2
	@$(SGLANG) -m benchmarks.demo_sglang $(ARGS)

test: ## every test gate, within its time budget (builds what it needs)
	@$(PYTHON) tests/run_gates.py $(ARGS)

faults: env-dev env-vllm env-sglang ## every fault against every door, at length; a table and build/faults.json (half an hour a round)
	@$(VLLM) -m tests.environments.models tiny-llama
	@$(SGLANG) -m tests.environments.sglang_models tiny-sg-llama
	@$(DEV) -m tests.faults $(ARGS)

lint: env-dev ## ruff and mypy
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy

format: env-dev ## let ruff rewrite what it can
	$(DEV) -m ruff check --fix .
	$(DEV) -m ruff format .

bench-tier: env-dev ## offline throughput of the tier on this machine's disk (no engine)
	@$(DEV) -m benchmarks.bench_tier $(ARGS)

bench-vllm: env-vllm ## time to first token in vLLM: recompute against restore
	@$(VLLM) tests/environments/models.py smollm2
	@$(VLLM) -m benchmarks.bench_vllm $(ARGS)

bench-sglang: env-sglang ## conversations in SGLang: no storage, its own file backend, ours (about 12 minutes)
	@$(SGLANG) -m tests.environments.models smollm2
	@$(SGLANG) -m benchmarks.bench_sglang $(ARGS)

env-dev:
	@$(PYTHON) tests/environments/build.py dev

env-vllm:
	@$(PYTHON) tests/environments/build.py vllm

env-sglang:
	@$(PYTHON) tests/environments/build.py sglang

clean: ## remove environments, models, logs and caches
	rm -rf .venvs .models build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
