# The only commands a person or CI needs; `make help` lists them.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
REQUIREMENTS ?= requirements/dev.txt
BIN := $(VENV)/bin

.PHONY: help setup demo check test cov stack bench soak fuzz lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "otel-correlation needs Python 3.11 or newer; none was found"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@# The lock names everything. Left to resolve it again, pip refuses what others require with an extra (pydantic[email]).
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(REQUIREMENTS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/.installed ## make the virtual environment

demo: setup ## start three services, send requests, show the failed one
	@$(BIN)/otel-correlation demo

check: setup ## lint, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

test: setup ## the fast suite, on this Python; TESTS=tests/unit runs a part
	$(BIN)/python -m pytest $(TESTS)

cov: setup ## branch coverage of the fast suite
	$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage report --skip-covered

stack: setup ## the real engines; STACK_SKIP=kafka,loki leaves out, TEMPO_BIN=... takes in
	$(BIN)/python -m pytest tests/stack

bench: setup ## side by side with stock, CPU per request
	$(BIN)/python benchmarks/side_by_side.py

soak: setup ## a million log records and no foreign id; then a million hostile request heads (an hour)
	$(BIN)/python -m tests.integration.soak
	$(BIN)/python -m tests.parsers.growth --all --check
	$(BIN)/python -m tests.integration.soak_hostile $(SOAK)

fuzz: setup ## every parser of foreign text, FUZZ_SECONDS=20 each; FUZZ="gzip" names some
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
		-r requirements/fuzz.txt 2>/dev/null \
		|| { echo "atheris has no wheel for $$($(BIN)/python --version) on this machine: nothing was fuzzed"; exit 1; }
	$(BIN)/python fuzz/run.py --seconds $(or $(FUZZ_SECONDS),20) $(FUZZ)

lock: ## renew the pinned requirements (needs uv)
	uv pip compile pyproject.toml $(LOCK) --output-file requirements/dev.txt
	uv pip compile pyproject.toml $(LOCK) --constraint requirements/oldest.in --output-file requirements/oldest.txt
	uv pip compile pyproject.toml $(PIN) --extra local --group libraries --output-file requirements/libraries.txt
	uv pip compile requirements/build.in $(PIN) --constraint requirements/dev.txt --output-file requirements/build.txt
	uv pip compile pyproject.toml requirements/service.in $(PIN) --constraint requirements/dev.txt --output-file requirements/service.txt
	uv pip compile $(PIN) --group pyproject.toml:fuzz --output-file requirements/fuzz.txt

PIN := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet
LOCK := $(PIN) --extra local --extra config --group test --group check

clean: ## remove what setup and the tests made
	rm -rf $(VENV) dist build .coverage .hypothesis .pytest_cache .mypy_cache .ruff_cache
