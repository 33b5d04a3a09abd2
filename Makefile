# Two entry points: `make demo` shows what quantkit does, `make test` proves that it works. Both set themselves up.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= out/demo-w4
TORCH ?= torch==2.13.0

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

# Coverage costs next to nothing from Python 3.12 on, where the interpreter itself reports lines. Before, it takes more than half as
# long again, so there the tests run without.
test: lint types docs
	mkdir -p out
	if $(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 12))"; then \
		COVERAGE_CORE=sysmon $(BIN)/coverage run $(BIN)/pytest && \
		$(BIN)/coverage report --format=total | sed 's/.*/line coverage of quantkit: &%/'; \
	else \
		$(BIN)/pytest && echo "line coverage is measured with Python 3.12 and newer"; \
	fi

# Builds both distributions, compares the source distribution with what git tracks, and runs the wheel in an empty environment.
wheel: setup-test
	PYTHON=$(BIN)/python TORCH="$(TORCH)" .ci/wheel

clean:
	rm -rf $(VENV) out build *.egg-info
