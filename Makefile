# Everything runs in .venv, which the first call creates.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet
JOBS ?= 2
# Where no GPU is found, PyTorch is installed as built for the CPU: 4 GB less than with CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup test oldest lint demo docs notebooks wheel clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.installed ## create .venv and install the library with its tools

# Made anew when the dependencies or the C++ kernels may have changed; the stamp is written last, so a broken install
# is tried again.
$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard $(addprefix astroattn/ops/native/,*.cpp *.h build.py))
	@test -n "$(PYTHON)" || { echo "astroattn needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null \
		|| { $(PIP) install --isolated --retries 0 --timeout 15 --index-url $(TORCH_INDEX) torch torchvision \
			&& $(BIN)/python -c 'import torchvision' 2>/dev/null; } \
		|| { echo "make: $(TORCH_INDEX) has no PyTorch with a torchvision that fits it; the plain one takes 4 GB more" >&2; \
			$(PIP) uninstall --yes torch torchvision; }
	$(PIP) install --editable '.[all,dev]'
	@touch $@

lint: setup ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror astroattn/ops/native/*.h astroattn/ops/native/*.cpp

test: lint ## lint, then the tests (JOBS=2 at a time)
	$(BIN)/python -m pytest -n $(JOBS)

# NumPy 2.4 is newer than what the interpreter of that Triton knows.
oldest: ## the tests with the oldest versions that are supported, in .venv-oldest
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --quiet install --editable '.[all,dev]' 'numpy<2.4' \
		torch==2.8.0 transformers==5.0.0 timm==1.0.20
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS)

demo: setup ## patch a BERT and a ViT, and see what it cost (writes out/demo)
	$(BIN)/python -m eval.demo

docs: setup ## the documentation as a site (in site), strictly: a dead link or an example that fails is an error
	$(BIN)/python -m zensical build --clean --strict

notebooks: setup ## the examples of the documentation as notebooks, run (in out/notebooks)
	mkdir -p out/notebooks
	for page in docs/examples/*.md; do \
		$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --run-path . --execute \
			--output out/notebooks/$$(basename $$page .md).ipynb $$page || exit 1; done

# PyTorch brings libgomp.so.1, and is loaded before the kernels: a second one would be a second pool of threads.
wheel: setup ## the wheel, named after the systems that it runs on, and the sdist (in dist)
	rm -rf build/wheel dist
	$(BIN)/python -m build --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) $(VENV)-oldest out dist build site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
