# Everything runs in .venv, which the first command makes. Python (3.11 or newer) and make are all that is needed.
# `make PYTHON=/path/to/python3.12 test` chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
SEARCH := $(if $(filter file default undefined,$(origin PYTHON)),python3 python3.13 python3.12 python3.11,$(PYTHON))
ONE_THREAD := OMP_NUM_THREADS=1  # for each of the test processes: two threads in two processes are slower than one
KEEP_MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=536870912  # see nbs/64_notebooks.ipynb
NOTEBOOK_ENV := CUDA_VISIBLE_DEVICES= MPLBACKEND=agg PYTHONHASHSEED=0

.DEFAULT_GOAL := help
.PHONY: help reproduce test test-all lab docs serve bench export lint readme save lock

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | while IFS= read -r line; do \
		printf '  make %-10s %s\n' "$${line%%:*}" "$${line##*## }"; done

reproduce: .venv/.installed  ## run the notebooks of the papers, report into reports/
	@$(BIN)/xai-companion reproduce

test: .venv/.installed  ## run the tests that take seconds
	@$(ONE_THREAD) $(KEEP_MEMORY) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-all: .venv/.installed  ## run all tests
	@$(ONE_THREAD) $(KEEP_MEMORY) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m ""

lab: .venv/.installed  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter-lab --notebook-dir=nbs

docs: .venv/.installed  ## build the site into docs/_build/html
	@$(BIN)/python docs/nb2myst.py html

serve: docs  ## show the site at http://127.0.0.1:8000
	@$(BIN)/python -m http.server --directory docs/_build/html --bind 127.0.0.1 8000

bench: .venv/.installed  ## measure what the explainers cost
	@$(BIN)/xai-companion bench

export: .venv/.installed  ## write the package from the notebooks
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean

lint: .venv/.installed  ## check the style
	@$(BIN)/ruff check

readme: .venv/.installed  ## write README.md from nbs/index.ipynb
	@$(BIN)/python docs/nb2myst.py readme

save: .venv/.installed  ## run a notebook and store its outputs: make save NB=nbs/00_core.ipynb
	@test -f "$(NB)" || { echo "which notebook? For example: make save NB=nbs/00_core.ipynb"; exit 1; }
	@$(NOTEBOOK_ENV) $(BIN)/nbdev-test "$(NB)" --save --n-workers 0
	@$(BIN)/nbdev-clean --fname "$(NB)"

lock: .venv/.installed  ## write requirements.lock from what is installed in .venv
	@$(BIN)/pip freeze --exclude-editable > .venv/freeze.txt
	@grep -viE '^(nvidia|triton|cuda)| @ |^-' .venv/freeze.txt | sed 's/+[a-z0-9.]*$$//' > .venv/lock.txt
	@mv .venv/lock.txt requirements.lock

# The stamp is touched last, so an installation that was interrupted is repeated, and one that stands costs nothing.
.venv/.installed: pyproject.toml requirements.lock
	@python=; for name in $(SEARCH); do \
		"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { python=$$name; break; }; done; \
	[ -n "$$python" ] || { \
		echo "Python 3.11 or newer is needed, not found among: $(SEARCH). Install it, or name one: make PYTHON=/path/to/python"; \
		exit 1; }; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$$python cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; \
		exit 1; }; \
	$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		"$$python" -m venv --clear .venv || { echo "$$python could not make .venv, see above"; exit 1; }
	@echo "Installing into .venv (5 GB, a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock 'setuptools>=77' -e '.[dev]' \
		> .venv/install.log 2>&1 || { \
		echo "The installation failed: $$(sed -n 's/.*ERROR: //p' .venv/install.log | head -n 1)"; \
		echo "No network, or a proxy in between? All of it is in .venv/install.log; the same command tries again."; exit 1; }
	@touch $@
