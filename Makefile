# Two commands do nearly everything on a machine with Python (3.11 or newer) and make:
#   make demo    train a small ResNet with backpropagation and with dtrp, and show the two side by side
#   make test    lint, types and tests
# and one more builds the documentation, into build/docs:
#   make docs    needs no network once installed; a warning or a dead link is an error
# Another torch and another Python, in an environment of their own (.venv-torch2.6.0-python3.12), which is kept:
#   make test-torch TORCH=2.6.0 PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_VENV := .venv-torch$(TORCH)-$(notdir $(PYTHON))

.PHONY: demo docs test test-full test-torch mutants wheel lint format clean

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

# PIP_OPTIONS: more options of pip install, as an index of torch for CPUs alone. TESTS: some of the tests, as tests/splitting.
# Warnings are errors; the ignored ones are about what older versions of torch do themselves when they save, and about Python 3.13.0.
IGNORED := -W "ignore:TypedStorage is deprecated:UserWarning" -W "ignore:Guards may run slower on Python:RuntimeWarning"
test-torch: $(TORCH_VENV)/.installed
	$(TORCH_VENV)/bin/python -m pytest -q -n 2 --dist worksteal -rs $(IGNORED) $(TESTS)

# The wheel as its users have it: built, and tried in another folder, in an environment of its own.
wheel: $(VENV)/.installed
	.ci/wheel $(BIN)/python

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

$(TORCH_VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(TORCH)" || { echo "which torch? make test-torch TORCH=2.6.0 PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(TORCH_VENV)
	grep -v '^torch==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_OPTIONS) \
		-c $(TORCH_VENV)/constraints.txt torch==$(TORCH) -e '.[report,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-torch* build dist *.egg-info
