# Everything is built inside this folder: .venvs/ (environments), .models/ (small models), build/ (logs, caches).
# PYTHON makes the environments; the targets then run inside them.
PYTHON ?= python3

DEV  := .venvs/dev/bin/python
VLLM := .venvs/vllm/bin/python
SGLANG := .venvs/sglang/bin/python
DEVICE := .venvs/device/bin/python
# Where this is set, every process would compile what it imports, every time: with an engine, that doubles a start.
export PYTHONDONTWRITEBYTECODE :=
# Arguments for the script behind a target, as in: make bench-tier ARGS="--help"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang test faults trust lint format bench-tier bench-protection bench-vllm bench-sglang env-dev env-vllm env-sglang env-device clean \
	compare bench-recompute-tax env-lmcache kernels test-kernels sass-table test-gpu bench-gpu

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

faults: env-dev env-vllm env-sglang ## every fault against every door, at length; a table and build/faults.json (about ten minutes a round)
	@$(VLLM) -m tests.environments.models tiny-llama
	@$(SGLANG) -m tests.environments.sglang_models tiny-sg-llama
	@$(DEV) -m tests.faults $(ARGS)

trust: env-dev env-vllm env-sglang ## contention, hostile inputs, capacity, tenants, at length; build/*.json (two hours)
	@$(VLLM) -m tests.environments.models tiny-llama
	@$(SGLANG) -m tests.environments.sglang_models tiny-sg-llama
	@$(DEV) -m tests.trust.hostile
	@$(DEV) -m tests.trust.capacity
	@$(DEV) -m tests.trust.tenants
	@$(VLLM) -m tests.trust.contention

test-kernels: env-device ## the CUDA kernels without a GPU (part of `make test`)
	@$(DEVICE) -m pytest tests/kernels $(ARGS)

test-gpu: env-device ## the same and more on a real GPU; engines with ARGS="--vllm PYTHON --sglang PYTHON" (exit code 3 without one; not run on a GPU yet)
	@$(DEVICE) -m tests.gpu.run $(ARGS)

bench-gpu: env-device ## gather and scatter on a real GPU (exit code 3 without one; not run on a GPU yet)
	@$(DEVICE) -m benchmarks.bench_gpu $(ARGS)

kernels: env-device ## rebuild the fatbin that ships, with the pinned nvcc
	@$(DEVICE) kernels/build.py $(ARGS)

sass-table: env-device ## registers, spills and loads in flight of every kernel on every target
	@$(DEVICE) -m tests.kernels.sass_table

lint: env-dev ## ruff and mypy
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy

format: env-dev ## let ruff rewrite what it can
	$(DEV) -m ruff check --fix .
	$(DEV) -m ruff format .

bench-tier: env-dev ## offline throughput of the tier on this machine's disk (no engine)
	@$(DEV) -m benchmarks.bench_tier $(ARGS)

bench-protection: env-dev ## what authenticated and encrypted chunks cost (no engine)
	@$(DEV) -m benchmarks.bench_protection $(ARGS)

bench-vllm: env-vllm ## time to first token in vLLM: recompute against restore
	@$(VLLM) tests/environments/models.py smollm2
	@$(VLLM) -m benchmarks.bench_vllm $(ARGS)

bench-sglang: env-sglang ## conversations in SGLang: no storage, its own file backend, ours (about 12 minutes)
	@$(SGLANG) -m tests.environments.models smollm2
	@$(SGLANG) -m benchmarks.bench_sglang $(ARGS)

compare: env-dev env-vllm env-sglang env-lmcache ## peers in one run: vLLM, SGLang and LMCache's own, and ours; writes benchmarks/RESULTS.md (about an hour)
	@$(VLLM) tests/environments/models.py smollm2
	@$(SGLANG) -m tests.environments.models smollm2
	@$(DEV) -m benchmarks.compare $(ARGS)

bench-recompute-tax: env-vllm ## what share of prefill goes to tokens computed before, with and without us (about 5 minutes)
	@$(VLLM) tests/environments/models.py smollm2
	@$(VLLM) -m benchmarks.bench_recompute_tax $(ARGS)

env-dev:
	@$(PYTHON) tests/environments/build.py dev

env-vllm:
	@$(PYTHON) tests/environments/build.py vllm

env-sglang:
	@$(PYTHON) tests/environments/build.py sglang

env-device:
	@$(PYTHON) tests/environments/build.py device

env-lmcache:
	@$(PYTHON) tests/environments/build.py lmcache

clean: ## remove environments, models, logs and caches
	rm -rf .venvs .models build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
