# `make demo` and `make test` are the only two commands a newcomer needs; each sets up everything itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_SECONDS ?=
PYTEST_ARGS ?=

.PHONY: setup demo serve test test-all check format bench motion8 moving-shapes docs clean

setup: $(VENV)/.run

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: Python >= 3.11 is needed; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing the service into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@# alone: its opencv-python would need libGL and overwrite opencv-python-headless
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps trackers
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "installing the test tools into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# alone: it asks for protobuf < 7, and runs with what is there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps tritonclient
	@touch $@

demo: $(VENV)/.run
	$(BIN)/tsm demo $(if $(DEMO_SECONDS),--seconds $(DEMO_SECONDS))

serve: $(VENV)/.run
	$(BIN)/tsm serve

# tests/integration wants the machine for itself; the others run two at a time, in order: the longest files come early
TWO_AT_A_TIME := --ignore tests/integration --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: TIER := -m "not slow"
test test-all: $(VENV)/.test
	@bash tests/system_packages.sh
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(TIER) $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TIER) $(TWO_AT_A_TIME)
	$(BIN)/python -m pytest $(TIER) tests/integration
endif

check: $(VENV)/.test
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/tables.py --check
	$(BIN)/python helm/make_schema.py --check
	$(BIN)/python -m services.rpc.make_stubs --check

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmark.run
	$(BIN)/python -m tests.benchmark.training
	$(BIN)/python -m tests.benchmark.sequences
	$(BIN)/python docs/tables.py

motion8: $(VENV)/.test
	$(BIN)/python -m tests.benchmark.motion8
	$(BIN)/python docs/tables.py

moving-shapes: $(VENV)/.test
	$(BIN)/python -m tests.benchmark.moving_shapes $(FOLDER)
	$(BIN)/python docs/tables.py

docs: $(VENV)/.test
	$(BIN)/python docs/tables.py
	$(BIN)/python helm/make_schema.py
	$(BIN)/python -m services.rpc.make_stubs

clean:
	rm -rf $(VENV) .tsm .pytest_cache .mypy_cache .ruff_cache build *.egg-info
