# aprillab: `make demo` shows what a gradient gives away, `make test` checks everything, `make help` lists the rest.
# It keeps a virtual environment in .venv and needs GNU make and a POSIX shell; README.md has the commands without make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
CHAPTERS = $(if $(NOTEBOOKS), --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
# The index of PyTorch's build for the CPU, as its site names it: a make argument, once, while $(VENV) is new.
TORCH_INDEX ?=
ifneq ($(and $(TORCH_INDEX),$(wildcard $(VENV)/.created)),)
$(info note: $(VENV) is there already, and keeps the PyTorch that it has; delete it for another)
endif
# pip compiles one file after the other; this, one on each core.
# What does not compile (some packages bring templates) is left, as pip leaves it.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint federation silenced lab playground notebooks student slides studies book wheel clean

help:  ## list the commands
	@echo 'aprillab: how shared gradients give away the images of a Vision Transformer'\''s users'
	@echo
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name what; do \
	    printf '  make %-11s %s\n' "$$name" "$$what"; done
	@echo
	@echo 'The first of them creates $(VENV) with $(PYTHON); for another Python: make demo PYTHON=python3.12'

demo: $(VENV)/.installed-base  ## get a private photograph back from gradients; writes demo.png and prints a table
	$(BIN)/aprillab demo --out demo.png

# Two workers, a file each at a time, one thread each: on two cores nearly twice as fast as one after the other.
# The long files, the chapters, come first, and not those of many tests: so neither worker waits for the other at the end.
test: lint  ## run the linters, the tests, the examples in docstrings and every notebook
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest$(CHAPTERS) tests aprillab \
	    -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy aprillab

federation: $(VENV)/.installed-federation  ## run a real federation with a server that looks; writes runs/federation
	$(BIN)/aprillab federation --out runs/federation

silenced: $(VENV)/.installed-federation $(VENV)/.installed-studies  ## cheat through Flower's secure sum, in one process; writes runs/silenced
	$(BIN)/python -m studies.cheating.secure --out runs/silenced

# From here, and not from notebooks/, so that links to the package and to results lead somewhere.
lab: $(VENV)/.installed-lab  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

playground: $(VENV)/.installed-workshop  ## show the playground as a page, for a workshop's screen; on this machine only
	$(BIN)/voila notebooks/playground.ipynb --Voila.ip=127.0.0.1

notebooks: $(VENV)/.installed-lab  ## run every notebook again and write its outputs into it
	$(BIN)/python tools/run_notebooks.py

student: $(VENV)/.installed-lab  ## write the notebooks without solutions and outputs into student/
	$(BIN)/python tools/make_student_notebooks.py

slides: $(VENV)/.installed-lab  ## make the half day's slides of the chapters' figures: build/half-day.html
	$(BIN)/python tools/make_slides.py

studies: $(VENV)/.installed-studies  ## measure what data/results lacks of the closed forms, and write their page
	$(BIN)/python -m studies.closed_forms

book: $(VENV)/.installed-book  ## build the site from chapters, results and docstrings; open build/book/index.html
	$(BIN)/python tools/build_book.py

wheel: $(VENV)/.created  ## build dist/aprillab-*.whl, with the pictures inside
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean:  ## delete demo.png, dist and caches; keeps .venv (delete that folder to start afresh)
	rm -rf demo.png build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find aprillab studies tests tools notebooks data \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} + 2>/dev/null || true

# --- The environment: one stamp a set of packages, so that nothing is installed twice until pyproject.toml changes.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'aprillab needs Python 3.11 or newer, and "$(PYTHON)" is older or missing:' >&2; \
	    $(PYTHON) --version >&2; \
	    echo 'name one that is, for instance: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12' >&2; \
	    exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo 'The virtual environment could not be made. On Debian and Ubuntu: apt install python3-venv' >&2; \
	    exit 1; }
	$(if $(TORCH_INDEX),$(PIP_INSTALL) torch torchvision --index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.installed-base: pyproject.toml | $(VENV)/.created
	$(PIP_INSTALL) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-lab $(VENV)/.installed-workshop $(VENV)/.installed-studies $(VENV)/.installed-federation $(VENV)/.installed-book $(VENV)/.installed-test: $(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(PIP_INSTALL) -e ".[$*]"
	@$(COMPILE)
	@touch $@
