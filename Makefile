# Each target sets up .venv first, if it is not there or its dependencies have changed.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test lint bench reproduce soak

VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed
LIBTPU := $(VENV)/tpu-compiler/.installed
WORKERS ?= 2

demo: $(STAMP)
	@$(RUN) launch.demo --workdir=runs/demo $(if $(CLEAN),--clean)

test: export JAX_PLATFORMS ?= cpu
test: $(STAMP) $(LIBTPU)
	@$(RUN) pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

bench: $(STAMP)
	@$(RUN) benchmarks.run

reproduce: $(STAMP)
	@$(RUN) benchmarks.reproduce $(if $(FIGURE),--figure=$(FIGURE)) $(if $(SEEDS),--seeds=$(SEEDS))

# Hours: fuzzers with 100 times as many examples, then kills, damage, full disks and lost workers. It goes on if it is
# started again.
soak: $(STAMP)
	@$(RUN) pytest tests/fuzz -q --hypothesis-profile=soak
	@$(RUN) benchmarks.soak --workdir=runs/soak --json=runs/soak/trust.json

# The first Python >= 3.11 that runs and can make an environment. 3.13 comes last: a dependency of seqio has
# no wheel for it and needs a C++ compiler. A name on PATH proves nothing (it may be a shim), so each is run.
define FIND_PYTHON
found=; bare=; \
for name in python3.12 python3.11 python3 python3.13 python; do \
  $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
  if $$name -c 'import venv, ensurepip' >/dev/null 2>&1; then found=$$name; break; fi; \
  bare=$${bare:-$$name}; \
done; \
if [ -z "$$found" ] && [ -n "$$bare" ]; then \
  echo "error: $$bare has no venv module: install it (Debian: apt install python3-venv)" >&2; exit 2; \
elif [ -z "$$found" ]; then \
  echo "error: no Python 3.11 or newer on PATH: install one, 3.12 or 3.11 for choice" >&2; exit 2; \
fi
endef

# The stamp is touched last, so an installation that was cut short is taken up again.
$(STAMP): pyproject.toml setup.py constraints.txt
	@if ! $(RUN) pip --version >/dev/null 2>&1; then \
	  $(FIND_PYTHON); \
	  echo "making $(VENV) with $$found"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) (about 3 GB, mostly TensorFlow; a few minutes)"
	@$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The TPU compiler, which runs without a TPU; beside the packages and not among them, or JAX would look for chips.
$(LIBTPU): constraints.txt $(STAMP)
	@mkdir -p $(@D)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(RUN) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) \
	    --constraint constraints.txt libtpu; \
	fi
	@touch $@
