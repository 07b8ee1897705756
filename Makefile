# make demo      everything from a trained model to text and a benchmark against attention, on this machine
# make test      the tests that take seconds each; SLOW=1 (or make test-all) adds those that take longer, and
#                EDGESEQ_EVERY=1 every pair of family and storage, of which otherwise each family has one in turn
# make lint      style, types, import arrows
# make format    rewrite Python and C the way lint wants them
# make wheel     build dist/*.whl
# make clean     remove what was built; make distclean removes the virtual environment too

BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?=
PIP_ARGS ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 4 ] && echo $$n || echo 4)
SELECT := $(if $(SLOW),-m "",)
PYTEST_ARGS ?= -n $(WORKERS) --dist loadfile
C_FILES := $(shell find runtimes/c -name '*.c' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format wheel clean distclean

help:
	@sed -n 's/^# //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	@PYTHON='$(PYTHON)' PIP_ARGS='$(PIP_ARGS)' scripts/setup $(STAMP)

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo

test: $(STAMP)
	@$(BIN)/python -m pytest $(PYTEST_ARGS) $(SELECT)

test-all:
	@$(MAKE) --no-print-directory test SLOW=1

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(C_FILES),$(BIN)/clang-format --dry-run -Werror $(C_FILES))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(C_FILES),$(BIN)/clang-format -i $(C_FILES))

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
