# Targets for newcomers and build machines. `make` alone lists them.
#
# Variables: PYTHON  the Python for the virtual environment                 (make PYTHON=python3.12 ...)
#            TORCH   what pip installs as torch, with options               (make TORCH="torch --index-url URL" ...)
#            EXTRAS  the extras of pyproject.toml to install                (make setup EXTRAS=serve)
#            WORKERS number of test processes                               (make test WORKERS=4)
#            ARGS    additional arguments for the program                   (make test ARGS="-k recipe")

PYTHON ?= python3
TORCH_PINNED := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(TORCH_PINNED)
EXTRAS ?= train,gguf,dev
WORKERS ?= 3
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -rfE
export PYTHON TORCH TORCH_PINNED EXTRAS
export PYTHONDONTWRITEBYTECODE := # compiled modules are kept: the tests start Python hundreds of times

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-fast test-avx2 test-remote check docs fuzz campaign bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## set up .venv (the other targets do this themselves)
	@sh scripts/setup.sh

demo: setup ## set up and run the demo, which searches the documentation of your Python's standard library
	@$(BIN)/d2llm demo $(ARGS)

test: setup ## set up and run the tests of all that a change of the core can break: ten minutes
	@sh scripts/browser.sh
	@echo "==> running the tests in $(WORKERS) processes (make test-all runs the rest too)"
	@$(PYTEST)s --durations=5 --durations-min=5 -m "not rest" $(ARGS)

test-all: setup ## set up and run all tests, with more examples; ARGS="-m rest" runs those that make test leaves out
	@sh scripts/browser.sh
	@echo "==> running all tests in $(WORKERS) processes"
	@D2LLM_TEST_ALL=1 $(PYTEST)s --durations=5 --durations-min=5 $(ARGS)

test-fast: setup ## set up and run the quick tests, which start no programs: two minutes
	@echo "==> running the quick tests in $(WORKERS) processes"
	@$(PYTEST) -m "not slow" $(ARGS)

test-avx2: setup ## run the numeric tests as on a CPU with AVX2 only, even if this one has more
	@echo "==> running the numeric tests with AVX2 only in $(WORKERS) processes"
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FAISS_OPT_LEVEL=AVX2 \
		$(PYTEST) -m numeric $(ARGS)

test-remote: setup ## install llama.cpp's server (takes minutes to compile) and test the remote teacher against it
	@echo "==> installing llama-cpp-python[server]"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c .venv/constraints.txt -e '.[remote-test]'
	@echo "==> testing against a real server"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -rs $(ARGS) tests/e2e/test_remote_server.py

check: setup ## set up and check format, lint, types and import order
	@echo "==> checking the format (ruff format)"
	@$(BIN)/ruff format --check .
	@echo "==> checking the code (ruff)"
	@$(BIN)/ruff check .
	@echo "==> checking the types (pyright)"
	@$(BIN)/pyright -p pyproject.toml
	@echo "==> checking the import order (import-linter)"
	@$(BIN)/lint-imports

docs: setup ## set up and build the documentation as a site, in site/; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)
	@echo "==> to read it: $(BIN)/python -m http.server --directory site"

fuzz: setup ## set up and send the server requests that its OpenAPI description allows, and others
	@$(BIN)/python scripts/fuzz_api.py $(ARGS)

campaign: setup ## set up and run every row of the campaign of faults to its full number of cases: hours
	@set -e; for row in $$(grep -l '^ROW = Row(' tests/campaign/*.py); do \
		OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=tests \
			$(BIN)/python -m campaign.$$(basename $$row .py) $(ARGS); \
	done

# Benchmarks that need a folder or a recipe as an argument: `make bench` leaves them out.
WITH_ARGUMENTS := ablation_sets binarised candidate_depth classify documentation first_minutes fit_quality heads \
	judged_sets labelled_queries learned_words_score recorded_gate recorded_lists reranking score_features_ablation \
	similar soup stages symmetric_branch token_interaction typing_errors waiting_threads written_rounds \
	written_tasks

bench: setup ## set up and run every benchmark that needs no arguments, printing its table
	@set -e; for script in $(filter-out $(WITH_ARGUMENTS:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
		echo "==> $$script"; $(BIN)/python "$$script" $(ARGS); \
	done

clean: ## remove .venv, caches and builds
	@echo "==> removing .venv, caches and builds"
	@rm -rf .venv build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* htmlcov
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
