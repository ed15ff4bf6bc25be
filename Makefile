# `make demo` runs the whole job on real data; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := $(wildcard requirements/*.txt)
OUT ?= runs/demo
# Test files that run at the same time.
JOBS ?= 2

.PHONY: setup demo test test-fast check format clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, run the whole job on real data, print and draw the result"
	@echo "make test       set up, run the tests"
	@echo "make test-fast  the tests without Ray, without several processes and without the slow ones"
	@echo "make check      lint, format check, types"
	@echo "make format     format the code"
	@echo "make clean      remove .venv and runs/"

$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	"Python %d.%d is too old or too new: 3.11 or 3.12 is needed; run: make PYTHON=python3.11 $(MAKECMDGOALS)" % v)'
	@command -v g++ >/dev/null || command -v c++ >/dev/null || { \
	echo "No C++ compiler: DeepSpeed builds its CPU communication with one. Install g++ (Debian: apt-get install g++)."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade -r requirements/build.txt
	$(PIP) install --quiet -r requirements/all.txt -r requirements/dev.txt
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-deps --no-build-isolation -r requirements/no-deps.txt
	$(PIP) install --quiet --no-deps -r requirements/dev-no-deps.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(STAMP)

demo: setup
	$(BIN)/declip run demo --out $(OUT)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not ray and not distributed and not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy packages/*/src pipelines tests benchmarks

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
