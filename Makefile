# Every target sets .venv up first; once it is current that takes a moment.
#
#   make test ARGS="tests/unit -x"     ARGS goes to the command behind the target
#   make setup PYTHON=python3.12       builds .venv with another Python

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-versions coverage gpu-check lint format docs clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv: vLLM for this machine, and this package.
	@$(PYTHON) tools/setup_environment.py

demo: setup ## Compare vLLM with and without BudgetDraft on a small chat model.
	@$(BIN)/budgetdraft demo $(ARGS)

# Two processes, each with whole files: the tests of a file share engines. In the order
# of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup ## Run the tests, without the slow ones.
	$(PYTEST) $(ARGS)

test-slow: setup ## Run the slow tests.
	$(PYTEST) -m slow $(ARGS)

test-versions: setup ## Run tests of the seam on the oldest and the newest vLLM.
	@$(BIN)/python tools/other_vllm.py

coverage: setup ## Lines of the core that tests without an engine run: 90 % at least.
	$(PYTEST) tests/unit tests/kernel_parity tests/training --cov --cov-fail-under=90 $(ARGS)

gpu-check: setup ## Check on a GPU that it does what it promises: 6 minutes at most.
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

lint: setup ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Fix style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Build the documentation into site/.
	$(BIN)/python -m mkdocs build --strict $(ARGS)

clean: ## Remove builds and caches; .venv stays.
	rm -rf build dist site *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
