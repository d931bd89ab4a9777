# `make` prints what there is. Everything installs into $(VENV), made at the first call.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in so many processes of one thread each.
PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all test-faults lint fmt docs lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[sample,dev]'
	touch $@

install: $(STAMP) ## make the virtual environment and install the package with its tools

demo: $(STAMP) ## compress the bundled teacher and repair it by distillation (about ten minutes on two cores)
	$(BIN)/python -m kncompress train +experiment=wikitext_ilkd

test: $(STAMP) ## run the tests that need neither a GPU nor the hub nor long
	$(PYTEST)

test-all: $(STAMP) ## run every test that this machine can run
	$(PYTEST) -m ''

# Counts are kept here, a line a kind.
FAULTS := .pytest_cache/faults.jsonl
test-faults: export HYPOTHESIS_PROFILE := faults
test-faults: $(STAMP) ## try every fault: kills, damaged files, random inputs; writes docs/reliability.md
	mkdir -p $(dir $(FAULTS)) && rm -f $(FAULTS)
	began=$$(date +%s); KNCOMPRESS_FAULTS_OUT=$(abspath $(FAULTS)) $(PYTEST) -m '' tests/faults; status=$$?; \
	$(BIN)/python tests/faults/report.py $(FAULTS) $$(( $$(date +%s) - began )) docs/reliability.md && exit $$status

reproduce-%: $(STAMP) ## run a study of experiments/ again, such as reproduce-objectives; some read KNCOMPRESS_DATA
	@test -x experiments/$*/run.sh || { echo "reproduce-$*: the studies are $(notdir $(patsubst %/run.sh,%,$(wildcard experiments/*/run.sh)))"; exit 2; }
	PATH="$(abspath $(BIN)):$$PATH" experiments/$*/run.sh

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP) ## put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build site/ from docs/ and the docstrings; a broken link is an error
	$(BIN)/python docs/architecture.py
	$(BIN)/python -W error -m pdoc -d google -o docs/api kncompress
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: then strict lets warnings pass

lock: $(STAMP) ## write requirements.lock: the packages of constraints.txt with hashes
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report .lock.json -r constraints.txt
	$(BIN)/python tests/lock.py .lock.json requirements.lock
	rm .lock.json

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) docs/api site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
