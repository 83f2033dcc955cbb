# One short command for each use, the same for people and for CI. `make help` lists them.

VENV := .venv
RUN := $(VENV)/bin/python -m
# The first interpreter that runs and is new enough; looked for only when something is installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
MINUTES ?= 5
OUT ?= runs/demo
ARGS ?=

STAMP := $(VENV)/.installed
PIP := $(RUN) pip --quiet --disable-pip-version-check install -c constraints.txt
# Shapes and types of mor are checked as the tests run; an int may stand where a float is asked for.
TYPECHECKER := beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
# Two workers with one thread each: more threads would wait for each other on two cores. A file is
# one worker's, so that what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	'--jaxtyping-packages=mor,$(TYPECHECKER)'

.PHONY: help install demo test test-slow check format bench bench-gpu clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## create .venv and install mor with the tools for development

$(STAMP): pyproject.toml constraints.txt
	@python='$(PYTHON)'; \
	if [ ! -x $(VENV)/bin/python ] || ! $(RUN) pip --version >/dev/null 2>&1; then \
		if [ -z "$$python" ] || \
			! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "mor needs Python 3.11 or newer: install one, or name it with PYTHON=..." >&2; exit 1; \
		fi; \
		echo "creating $(VENV) with $$python"; \
		"$$python" -m venv $(VENV); \
	fi
	@echo "installing mor and its tools into $(VENV)"
	@# setuptools first: the build then needs nothing more, so a second install works offline.
	@$(PIP) 'setuptools>=77'
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

demo: install ## the main job end to end: MINUTES=5 OUT=runs/demo
	@$(VENV)/bin/mor demo --minutes $(MINUTES) --out "$(OUT)"

test: install ## all tests but the slow ones, with shapes checked; more options in ARGS=...
	@$(PYTEST) $(ARGS)

test-slow: install ## all tests
	@$(PYTEST) --runslow $(ARGS)

check: install ## lint, formatting, types, and the laws of the house
	@$(RUN) ruff check --quiet .
	@$(RUN) ruff format --quiet --check .
	@$(RUN) pyrefly check --progress-bar no
	@$(RUN) pytest -q tests/test_laws.py tests/test_public_api.py

format: install ## format the code and fix what the linter can
	@$(RUN) ruff check --quiet --fix .
	@$(RUN) ruff format --quiet .

bench: install ## measure training against its baselines; one JSON line
	@$(VENV)/bin/mor bench train --json

bench-gpu: install ## every test and benchmark that needs a GPU; records go to OUT
	@mkdir -p "$(OUT)"
	@$(PYTEST) -n 0 tests/ops/test_triton_kernels.py tests/engine/test_engine_triton.py \
		| tee "$(OUT)/tests.txt"
	@for n in 32 128 512; do \
		$(VENV)/bin/mor bench throughput --json --preset 360m --dtype bfloat16 --max-num-seqs $$n \
			> "$(OUT)/throughput-360m-bf16-$$n.json" || exit 1; \
	done
	@for n in 32 128; do \
		$(VENV)/bin/mor bench throughput --json --preset 360m --dtype bfloat16 --max-num-seqs $$n --num-scheduler-steps 1 \
			> "$(OUT)/throughput-360m-bf16-$$n-one-step.json" || exit 1; \
	done
	@$(VENV)/bin/mor bench latency --json --preset 360m --dtype bfloat16 > "$(OUT)/latency-360m-bf16.json"
	@$(VENV)/bin/mor bench train --json > "$(OUT)/train.json"

clean: ## remove caches and build products; .venv and runs/ stay
	@rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
