# Everything starts here. `make demo` and `make test` on a bare clone need git, make and a python3 with venv; nothing else.
# Another interpreter: PYTHON=python3.12 make demo

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# Ranks wait for each other much of the time: two workers keep two cores busy for 73 %, three for 91 %.
TEST_WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-rest lint lock clean

help:
	@echo 'make setup   make .venv with pinned packages and this project (fast when nothing changed)'
	@echo 'make demo    set up, then the whole chain at toy size: corpus, model, 4-process training, Hugging Face export'
	@echo 'make test    set up, then ruff, mypy and every promise once       (one test: make test PYTEST_ARGS="-k name")'
	@echo 'make test-all  the same with every case of every promise         (docs/testing.md; what make test left out: make test-rest)'
	@echo 'make lint    set up, then ruff and mypy only'
	@echo 'make lock    remake requirements.lock, keeping pins that still fit   (newest of everything: make lock UPGRADE=1)'
	@echo 'make clean   remove caches and demo_output; .venv stays (remove it with: rm -r .venv)'
	@echo
	@echo 'PYTHON=python3.12 make ...    use that interpreter for .venv (3.10 or newer)'
	@echo 'TORCH_BUILD=cpu|cuda make ... override the choice of PyTorch build'

setup:
	@$(PYTHON) example_scripts/setup_env.py

demo: setup
	@$(VENV_PYTHON) example_scripts/demo.py $(DEMO_ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy

PYTEST := $(VENV_PYTHON) -m pytest -n $(TEST_WORKERS) --dist worksteal

# pytest comes last, so that its summary is the last thing on the screen.
test: lint
	$(PYTEST) --tier quick $(PYTEST_ARGS)

test-all: lint
	$(PYTEST) --tier all $(PYTEST_ARGS)

test-rest: setup
	$(PYTEST) --tier rest $(PYTEST_ARGS)

lock:
	@$(PYTHON) example_scripts/lock_requirements.py $(if $(UPGRADE),--upgrade)

clean:
	@if [ -e demo_output ] && [ ! -e demo_output/.made_by_demo ]; then \
		echo 'demo_output was not made by the demo; left alone'; else rm -rf demo_output; fi
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
