# Two commands do nearly everything on a machine with Python (3.11 or newer) and make:
#   make demo    train a small ResNet with backpropagation and with dtrp, and show the two side by side
#   make test    lint, types and tests
# and one more builds the documentation, into build/docs:
#   make docs    needs no network once installed; a warning or a dead link is an error

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-full mutants lint format clean

demo: $(VENV)/.installed
	$(BIN)/dtrp demo

docs: $(VENV)/.installed
	rm -rf build/docs  # pictures and pages follow the code, of which a kept build knows nothing
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	$(BIN)/python docs/check.py build/docs

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 15 --durations-min 5

# The numbers as the issues word them: hours. CIFAR is the folder that holds cifar-10-batches-py.
test-full: lint
	DTRP_TEST_FULL=1 CIFAR=$(CIFAR) $(BIN)/python -m pytest -q -m "full or not full" --timeout 7200 -rs

# Defects of one line, each with the test that must fail on it (they are part of test-full too).
mutants: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "full or not full" tests/test_mutants.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[report,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
