# `make help` lists what there is. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
ARGS ?=
N ?= 40
TIME ?= 0
SEED ?= 1
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Quiet twice: errors are shown, warnings about the reader's own pip configuration are not.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --no-input --disable-pip-version-check
NEED_PYTHON := dtkit needs Python 3.11 or newer. Name one with PYTHON=, for example: make setup PYTHON=python3.12

.DEFAULT_GOAL := help
.PHONY: help setup demo docs site test test-long check format-check lint types format lab bench peers campaign hvd-conformance dist smoke clean

help: ## show this list
	@echo "make [target] [PYTHON=python3.12]    PYTHON= is the interpreter that .venv is made from"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install dtkit into it (the other targets do this by themselves)

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import pip' 2>/dev/null || { $(check-python) && $(create-venv); }
	@echo "Installing dtkit and what it needs into $(VENV) (the first time takes some minutes)"
	@$(PIP_INSTALL) --no-compile --constraint constraints.txt --editable '.[dev,live]'
	@$(compile)
	@touch $@
	@echo "Ready: $$($(BIN)/python --version) in $(VENV)"

demo: $(STAMP) ## run notebooks/01_first_run.ipynb on two engines; shows it in build/01_first_run.html
	@$(BIN)/python tools/build_notebook.py notebooks/01_first_run.ipynb --output-dir build

# Most of the time of most tests is waiting: two at once, then, by themselves, those that judge times.
test: $(STAMP) ## run all tests, WORKERS= files at a time; or ARGS= is passed to pytest: ARGS="-k ranks -x"
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone" $(LONG)
	@$(BIN)/python -m pytest -m alone $(LONG)
else
	@$(BIN)/python -m pytest $(LONG) $(ARGS)
endif

test-long: ## run them with what they leave out for its time; CONTRIBUTING.md lists it
	@$(MAKE) --no-print-directory test LONG=--long

# The quick ones first, types beside the documentation, and the tests through the README's own command.
check: $(STAMP) ## what CI runs: format, lint, types, documentation, tests
	@$(MAKE) --no-print-directory format-check
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory --jobs --output-sync types site
	@$(MAKE) --no-print-directory test

format-check: $(STAMP)
	@$(BIN)/ruff format --check --quiet . || { echo "The files above are not formatted. Run: make format" >&2; exit 1; }

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .

types: $(STAMP)
	@$(BIN)/mypy

format: $(STAMP) ## format the code and apply the linter's safe fixes
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

lab: $(STAMP) ## open the tutorials in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=notebooks

# The tutorials are run only if they, or the package, have changed since; not that on two hosts.
docs: $(STAMP) ## build the documentation with the tutorials' outputs: build/site/index.html
	@mkdir -p build/with_tutorials/tutorials
	@for notebook in $(filter-out notebooks/09_two_hosts.ipynb,$(wildcard notebooks/*.ipynb)); do \
		page=build/with_tutorials/tutorials/$$(basename $$notebook .ipynb).html; \
		[ -z "$$(find $$notebook dtkit -newer $$page -name '*.*' 2>&1 | head -1)" ] \
			|| $(BIN)/python tools/build_notebook.py $$notebook --site \
				--run-in build/runs_of_tutorials --output-dir $$(dirname $$page) || exit 1; \
	done
	@$(BIN)/python tools/build_notebook.py notebooks/09_two_hosts.ipynb --site --as-it-is \
		--output-dir build/with_tutorials/tutorials
	@$(MAKE) --no-print-directory site

# Warnings are errors. CI runs it without the tutorials, which its tests execute.
site: $(STAMP)
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs build/site
	@echo "Wrote build/site/index.html"

bench: $(STAMP) ## measure, and print each figure with its spread
	@$(BIN)/python -m benchmarks $(ARGS)

peers: $(STAMP) ## measure dtkit beside torchrun, ipyparallel and others, in an environment of their own
	@$(BIN)/python -m benchmarks.peers $(ARGS)

campaign: $(STAMP) ## random faults on real engines; N= how many, TIME= seconds at most, SEED=
	@$(BIN)/python tools/campaign --num $(N) --seconds $(TIME) --seed $(SEED)

HOROVOD_SRC ?= ../horovod
hvd-conformance: $(STAMP) ## run Horovod's own torch tests on dtkit's interface; HOROVOD_SRC= is a checkout
	@PYTHONPATH=. $(BIN)/python tools/hvd_conformance.py $(HOROVOD_SRC) $(ARGS)

dist: $(STAMP) ## build the wheel and the source distribution: dist/
	@rm -rf dist
	@$(BIN)/hatchling build

# Without a network where the system lets one be taken away; --constraint pins what CI tests.
SMOKE := build/smoke
smoke: dist ## install the wheel where nothing else is, and use it without a network; PYTHON=
	@$(PYTHON) -m venv --clear $(SMOKE)
	@$(SMOKE)/bin/python -m pip install --quiet --quiet --no-input --disable-pip-version-check \
		--constraint constraints.txt dist/*.whl
	@cd build && without_network=$$(unshare -rn true 2>/dev/null && echo unshare -rn); \
		$$without_network sh -c '! command -v ip >/dev/null || ip link set lo up; exec smoke/bin/python ../tools/smoke.py'

clean: ## remove .venv, build and the tools' caches; notebooks and runs stay
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

define check-python
{ "$(PYTHON)" -c '' >/dev/null 2>&1 || { echo "Cannot run $(PYTHON). $(NEED_PYTHON)" >&2; exit 1; }; \
  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1). $(NEED_PYTHON)" >&2; exit 1; }; \
  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
    || { echo "$(PYTHON) cannot create environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; }
endef

# What pip does on one core, and for the packages' own tests as well; a file for another Python fails.
define compile
$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
endef

define create-venv
{ echo "Creating $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear $(VENV); }
endef
