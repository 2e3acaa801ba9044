# `make train` and `make test` do everything on a machine that has only Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
BIN := $(VENV)/bin
PRECISE := tests/isotonic/test_threshold.py tests/isotonic/test_merge.py tests/isotonic/test_pav.py

.PHONY: train test test-slow bench lint clean

train: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/digits.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)

# Most of the suite's time is the compiler's: full optimisation only where the numerics are made.
# Not with --xla_cpu_use_fusion_emitters=false, though it compiles tests/routers/test_exactly_k.py in
# half the time: it rounds otherwise, and tests of exact numbers in test_topk.py, test_cascade.py fail.
test: $(VENV)/.tested lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist=loadfile $(PRECISE)
	XLA_FLAGS=--xla_backend_optimization_level=0 \
	  $(BIN)/python -m pytest -m "not slow" -n 2 --dist=loadfile $(PRECISE:%=--ignore=%) tests

test-slow: $(VENV)/.tested
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.tested
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"permoe needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
