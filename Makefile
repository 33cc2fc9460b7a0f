# make demo    install into .venv, make a comparison sheet with the embedded model, print where it is
# make test    install into .venv, check style and types, run the tests
# make wheel   build the wheel into dist/
#
# Needs Python 3 and make only. What is done already is not done again: the stamps in .venv depend on pyproject.toml and
# constraints.txt. VENV=folder uses another environment, PYTHON=python3.12 another interpreter.

PYTHON ?= python3
VENV ?= .venv
PYTEST_OPTIONS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.stamp-installed
TESTABLE := $(VENV)/.stamp-testable

.PHONY: demo test lint types pytest wheel clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/trimtab generate --compare --class Sandal --seeds 0-5 --steps 25 \
		--guidance cfg:scale=2 --guidance pag:scale=1 -o out

test: lint types pytest

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTABLE)
	MYPYPATH=$(VENV)/typing $(BIN)/mypy

pytest: $(TESTABLE)
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

wheel: $(TESTABLE)
	rm -rf build
	$(PIP) wheel --no-deps --wheel-dir dist .
	rm -rf build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(TESTABLE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	mkdir -p $(VENV)/typing
	ln -sfn "$(CURDIR)" $(VENV)/typing/trimtab
	touch $(INSTALLED) $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
