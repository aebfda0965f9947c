# make demo | make test | make clean.   PYTHON=/path/to/python3 chooses the interpreter of the environment.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
export PYTHON

.PHONY: help demo test check clean board-emulator

help:
	@echo 'make demo   the whole road on real data, a few minutes'
	@echo 'make test   style, types, import rules and tests (CI=true: the slow tests too)'
	@echo 'make board-emulator   a RISC-V board in emulation, for the tests that need one (root; docs/boards.md)'
	@echo 'make clean  remove the environment and everything built'

demo:
	@scripts/setup.sh demo
	@$(BIN)/python -m colonnade.cli demo

check:
	@scripts/setup.sh test
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

# pytest last: its closing line is the last one.
test: check
	@scripts/emulator.sh $(BIN)/python
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

# Never part of another goal: it needs root, and while a board runs a binfmt_misc interpreter is registered.
board-emulator:
	@scripts/setup.sh test
	@scripts/board_emulator.sh build

clean:
	@rm -rf .venv build-out colonnade-demo build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
