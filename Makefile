# `make demo` and `make test` need Python 3.11 or newer, git and make; the rest goes into .venv.

# The first of these that is new enough and can make virtual environments; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
TOO_OLD := error: Python 3.11 or newer with its venv module is needed: install it, or set PYTHON=/path/to/python

# Pyright would otherwise ask the network for its newest version.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint format lock .venv

demo: .venv
	rm -rf runs/demo
	$(BIN)/python -m launch demo

test: .venv
	$(PYTEST) -n 2 -m "not slow"

test-slow: .venv
	$(PYTEST) -m slow

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: .venv/.installed

# Written last, so that an interrupted install is repeated from the start.
.venv/.installed: requirements.lock setup.py
	@test -n "$(PYTHON)" || { echo "$(TOO_OLD)" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The newest versions that setup.py allows, resolved with the oldest Python that is supported.
lock:
	@test -n "$(PYTHON)" || { echo "$(TOO_OLD)" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear build/lock
	build/lock/bin/pip install --quiet ".[dev]"
	build/lock/bin/pip freeze --all --exclude pip --exclude gradient-fields > build/requirements.lock
	mv build/requirements.lock requirements.lock
