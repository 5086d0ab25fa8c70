# What a developer runs. CI runs `make check` and `make test` and has no commands of its own.

PYTHON ?= python3
ARGS ?=
DATA ?= ../shared
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test fuzz check house docs bench smollm2-tofu format clean

help: ## List the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' Makefile

demo: $(INSTALLED) ## Unlearn invented people from a tiny model (ARGS="--seed 1" adds options)
	@$(BIN)/palinode demo $(ARGS)

test: $(INSTALLED) ## Run the tests (ARGS="-k world" adds options)
	@$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(INSTALLED) ## Read 10,000 damaged files, minutes (ARGS="--cases 100 --only jsonl --seed 7" repeats some)
	@$(BIN)/python tests/fuzz/run.py $(ARGS)

check: $(INSTALLED) ## Check format, lint, types, and that the generated docs are current
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p palinode $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py))
	@$(BIN)/python docs/reference.py --check

house: $(INSTALLED) ## Measure the source: lines, files, long functions, circles, names (ARGS=--rooms runs one unlearn)
	@$(BIN)/python tests/house.py $(ARGS)

docs: $(INSTALLED) ## Write docs/cli.md from the commands' own help, and the site of all pages in build/site
	@$(BIN)/python docs/reference.py
	@$(BIN)/python -m mkdocs build
	@echo "Open build/site/index.html"

bench: $(INSTALLED) ## Run every speed and memory benchmark
	@for script in arithmetic inplace evaluation locate training; do echo "== $$script"; $(BIN)/python "benchmarks/$$script.py"; done

smollm2-tofu: build/smollm2 ## TOFU forget01 on SmolLM2-135M, about an hour (DATA=folder with data/tofu and tools)
	@$(BIN)/palinode run recipes/smollm2_tofu.toml --set data.forget=$(DATA)/data/tofu/forget01.jsonl \
		--set data.retain=$(DATA)/data/tofu/retain99.jsonl $(ARGS)

build/smollm2: | $(INSTALLED)
	@$(BIN)/python $(DATA)/tools/make_smollm2.py $@

format: $(INSTALLED) ## Format the code and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment, caches and build products; models and workspaces stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Palinode into $(VENV); the first time this fetches torch, which takes some minutes."
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' \
		| { grep --line-buffered -E '^ *(Downloading|Using cached|Installing)' || true; }
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Palinode needs Python 3.11 or newer, and $(PYTHON) is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -y python3-venv; } || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
