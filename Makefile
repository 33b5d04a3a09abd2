# Two entry points: `make demo` shows what quantkit does, `make test` proves that it works. Both set themselves up.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= out/demo-w4
TORCH ?= torch==2.13.0
WORKERS ?= 2

.PHONY: demo test lint types docs wheel setup setup-test clean

# An installed torch that satisfies the range is kept; pip never replaces it.
$(BIN)/quantkit: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.test: $(BIN)/quantkit
	$(BIN)/pip install --quiet --editable ".[demo,interop,serve,bench,docs,test]"
	touch $@

setup: $(BIN)/quantkit

setup-test: $(VENV)/.test

demo: setup
	$(BIN)/quantkit quantize demo -o $(DEMO_OUT) --recipe awq+gptq-w4 --samples 64 --overwrite
	$(BIN)/quantkit eval $(DEMO_OUT) --baseline demo
	$(BIN)/quantkit inspect $(DEMO_OUT)

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test
	$(BIN)/mypy

docs: setup-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Two processes share the tests out by file; each computes with one thread. Python 3.12 and newer report lines to coverage by
# themselves, which costs next to nothing; older ones need a tracer, with which the tests take about half as long again.
test: lint types docs
	mkdir -p out
	OMP_NUM_THREADS=1 COVERAGE_CORE=$$($(BIN)/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')") \
		$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report --format=total | sed 's/.*/line coverage of quantkit: &%/'

# Builds both distributions, compares the source distribution with what git tracks, and runs the wheel in an empty environment.
wheel: setup-test
	PYTHON=$(BIN)/python TORCH="$(TORCH)" .ci/wheel

clean:
	rm -rf $(VENV) out build *.egg-info
