# Each target sets up .venv first where it is missing. Times: two CPU cores, installation apart.
# make test-fast   small tests that start no process: the loop while editing; 50 s
# make test        every promise once, on TP2, PP2, DP2, EP2 and TP2 x DP2; 8 minutes
# make test-all    make test, then the remaining layouts and cases
# make test-slow   the tests that CI has no time for
# make lint        ruff, mypy and bandit             make check       lint and test-all, as CI does
# make test-faults   kill, stop, damage and contradict trainings, more than 600 times; prints the count
#                    (FAULT_WORKERS=1: with one data-loading process per rank alone, instead of with 0, 1 and 2)
# make test-fuzz   hypothesis on every reader of untrusted input (FUZZ_EXAMPLES=20000 for each target)
# make test-versions   short tests on the Megatron-Core versions between the oldest and the newest supported one
# make test-across     checkpoints from Megatron-Core 0.16 resumed under 0.19 and back; sets up both
# make audit   known vulnerabilities of the constraints, by pip-audit; needs a network
# make test-gpu    the tests that need a GPU, with the python that is found first (TEST_PYTHON=...), not with .venv
#
# PYTHON=python3.12 chooses the Python, and with it Megatron-Core: 0.16.1 on 3.11, 0.19.2 on 3.12 and 3.13.
# MEGATRON_CORE=0.18.2 sets up another version; give it a folder of its own: VENV=.venv-0.18.2
VENV ?= .venv
TEST_PYTHON ?= python3
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1

.PHONY: setup lint test-fast test test-all test-slow test-faults test-fuzz test-versions test-across test-gpu audit check

setup: $(VENV)/installed

# Whether there is an environment of another Python than is asked for: it is replaced.
IS_ANOTHER := $(shell $(PYTHON) tools/choose_constraints.py --differs-from $(VENV))

$(VENV)/installed: setup.py constraints.txt constraints-3.12.txt $(if $(IS_ANOTHER),FORCE)
	$(PYTHON) tools/choose_constraints.py --megatron-core "$(MEGATRON_CORE)" > /dev/null
	$(PYTHON) -m venv $(if $(IS_ANOTHER),--clear) $(VENV)
	$(PYTHON) tools/choose_constraints.py --megatron-core "$(MEGATRON_CORE)" > $(VENV)/constraints.txt
	$(VENV)/bin/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

FORCE:

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --recursive --configfile pyproject.toml megatron_hyperp tools examples benchmarks

# Two files at a time, those with few and long tests first.
PARALLEL := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(PARALLEL) -m "not slow and not matrix and not timing" tests/unit

# At the end, alone, the tests that compare times.
test: setup
	$(PARALLEL) -m "not slow and not matrix and not timing"
	$(VENV)/bin/python -m pytest -m "timing and not slow"

test-all: test
	$(PARALLEL) -m "matrix and not slow and not timing"

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

FUZZ_EXAMPLES ?= 20000
test-fuzz: setup
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(VENV)/bin/python -m pytest --timeout 0 tests/fuzz

# Contracts with Megatron-Core, checkpoints, and recorded losses (dense and experts, TP2 among others), in an environment
# for each version.
VERSIONS ?= 0.17.1 0.18.2
VERSION_TESTS = tests/unit/test_versions.py tests/unit/test_common_state.py tests/distributed/test_saved_values.py \
  tests/unit/test_megatron_contract.py tests/distributed/test_recorded_losses.py
test-versions: $(addprefix test-version-,$(VERSIONS))
test-version-%:
	$(MAKE) --no-print-directory setup VENV=.venv-$* MEGATRON_CORE=$* PYTHON="$(PYTHON)"
	.venv-$*/bin/python -m pytest $(VERSION_TESTS)

# Python 3.11 and 3.12 by these names; each gets an environment of its own.
OLD_PYTHON ?= python3.11
NEW_PYTHON ?= python3.12
test-across:
	$(MAKE) --no-print-directory setup VENV=.venv-0.16.1 PYTHON="$(OLD_PYTHON)"
	$(MAKE) --no-print-directory setup VENV=.venv-0.19.2 PYTHON="$(NEW_PYTHON)"
	OLD_MEGATRON_PYTHON=$(CURDIR)/.venv-0.16.1/bin/python NEW_MEGATRON_PYTHON=$(CURDIR)/.venv-0.19.2/bin/python \
	  .venv-0.19.2/bin/python -m pytest -m slow tests/functional/test_across_versions.py

# In an environment of its own: what is audited should not depend on the auditor.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip
	$(VENV)-audit/bin/pip-audit --requirement constraints-3.12.txt --no-deps --disable-pip

# Some tests mount disks of a few MB, which needs root; without it they are skipped, and the table says less.
FAULT_WORKERS ?= 0 1 2
test-faults: setup
	FAULT_WORKERS="$(FAULT_WORKERS)" $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "slow or not slow" tests/faults

# Measured figures are printed: -s. A GPU machine brings its own PyTorch, TransformerEngine and apex.
test-gpu:
	$(TEST_PYTHON) -m pytest -s -rs tests/gpu

check: lint test-all
