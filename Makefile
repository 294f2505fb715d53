# The one door: `make quickstart`, `make test`. Needs Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two files at a time; what a file's tests share is made once.
CORE := -m "not slow and not gpu" -q -n 2 --dist loadfile
# These wait for SLURM, or for Ray, more than they compute.
ON_SLURM := -n 4 --dist worksteal $(sort $(wildcard tests/clusters/test_slurm*.py))
ON_RAY := -n 2 --dist worksteal $(sort $(wildcard tests/clusters/test_ray*.py))
SHELL_FILES := .ci/run $(wildcard slurm/*.sbatch slurm/*.sh)

ROWS ?= $(error set ROWS to a file of Alpaca rows: make bench ROWS=alpaca_en.json)

.PHONY: quickstart install test test-core test-faults test-clusters test-gpu lint docs bench bench-generate clean

quickstart: .venv/installed
	$(BIN)/python -m dist_sft.quickstart --workers 2

install: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

test: install lint
	$(PYTEST) $(CORE)
	$(PYTEST) -m "slow and not matrix" -q --ignore=tests/clusters
	$(PYTEST) -m "slow and not matrix" -q $(ON_RAY)
	$(PYTEST) -m "slow and not matrix" -q $(ON_SLURM)

test-core: install
	$(PYTEST) $(CORE)

test-faults: install
	$(PYTEST) -m "not gpu" -q tests/faults

test-clusters: install
	$(PYTEST) -m "not gpu" -q $(ON_SLURM)
	$(PYTEST) -m "not gpu" -q $(ON_RAY)

test-gpu: install
	DIST_SFT_TEST_GPU=1 $(PYTEST) -m gpu -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	if command -v shellcheck >/dev/null; then shellcheck $(SHELL_FILES); fi

models/smollm2-135m: install
	$(BIN)/python benchmarks/get_smollm2.py $@

bench: install models/smollm2-135m
	$(BIN)/python benchmarks/train_speed.py --rows $(ROWS)

bench-generate: install models/smollm2-135m
	$(BIN)/python benchmarks/generate_speed.py --rows $(ROWS)

docs: install
	$(BIN)/python docs/settings.py > docs/settings.md

clean:
	rm -rf .venv runs/quickstart data/quickstart
