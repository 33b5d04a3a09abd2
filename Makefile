# Two entry points: `make demo` shows what quantkit does, `make test` proves that it works. Both set themselves up.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= out/demo-w4

.PHONY: demo test lint types setup setup-test clean

# An installed torch that satisfies the range is kept; pip never replaces it.
$(BIN)/quantkit: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.test: $(BIN)/quantkit
	$(BIN)/pip install --quiet --editable ".[demo,interop,serve,bench,test]"
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

test: lint types
	$(BIN)/pytest

clean:
	rm -rf $(VENV) out build *.egg-info
