# Each target is one command on a machine that has Python 3.11 and git.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint soak clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/vitok quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Half an hour of training under faults; MINUTES and SEED choose others.
soak: install
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),0)

clean:
	rm -rf $(VENV) build *.egg-info
