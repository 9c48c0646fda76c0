# make reproduce: install (first time) and run all notebooks. CI runs make test and make test-browser.
PYTHON ?= python3
PROFILE ?= mini
SEEDS ?= 1
# TORCH=cpu: PyTorch's own build for CPUs. PyPI's for Linux brings CUDA: 2.7 GB of wheels to download on x86_64, more unpacked.
TORCH ?=
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.lavic-installed
BOOK := $(CURDIR)/.venv-book
DEMO := $(VENV)/.lavic-demo
FRESH := $(CURDIR)/.cache/test
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONHASHSEED := 0
.PHONY: gallery reproduce test rehearsal test-browser book slides demo install install-all quick mini-model bench notebooks readme lock lab clean

reproduce: $(STAMP)
	$(PY) -m lavic_utils reproduce --profile $(PROFILE) --seeds $(SEEDS)

# Quick checks; then the mini run from an empty cache; then the committed notebooks against it.
test: quick
	rm -rf $(FRESH)
	LAVIC_RESULTS=$(FRESH)/results LAVIC_WORLD=$(FRESH)/data $(PY) -m lavic_utils reproduce --profile mini
	LAVIC_RESULTS=$(FRESH)/results LAVIC_WORLD=$(FRESH)/data PYTHONPATH=$(CURDIR) $(PY) -m pytest -q --nbval-lax \
		--nbval-current-env --nbval-cell-timeout 900 --timeout 0 -p no:cacheprovider notebooks

# What docs/researcher.md lists, command by command, on stand-ins of the models and the data: minutes.
rehearsal: $(STAMP)
	$(PY) tests/rehearsal.py

quick: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(PY) -m lavic_utils environment --check
	$(PY) docs/readme.py --check
	$(PY) -m lavic_utils notebooks check
	$(PY) -m pytest -q tests --ignore tests/browser

# The site of docs/site/_toc.yml in docs/_build/html; SOLUTIONS=no leaves the exercises' solutions and the
# teachers' pages out. Its tools need another markdown-it-py than JupyterLab does: an environment of their own, without torch.
book: $(BOOK)/.installed
	$(BOOK)/bin/python docs/build.py $(BOOKFLAGS) $(if $(filter no,$(SOLUTIONS)),--no-solutions)

# The 90 minutes of docs/teaching.md as slides: docs/_build/slides/index.html.
slides: $(BOOK)/.installed
	$(BOOK)/bin/python docs/build.py --slides

$(BOOK)/.installed: docs/requirements.lock
	test -x $(BOOK)/bin/python || $(PYTHON) -m venv $(BOOK)
	@echo "installing the site's tools into .venv-book (once; under a minute)"
	$(BOOK)/bin/python -m pip install --quiet -r docs/requirements.lock
	touch $@

# The site and the demo in the system's Chromium; skipped where there is none, unless LAVIC_BROWSER=required.
test-browser: $(DEMO) book slides
	$(PY) -m pytest -q tests/browser

install: $(STAMP)

# Also what demo, book and slides would install at their first call.
install-all: $(DEMO) $(BOOK)/.installed

# torch first and alone, at the version of the lock: nothing after it may choose another build.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned environment into .venv (once; a few minutes)"
	$(PY) -m pip install --quiet $(if $(filter cpu,$(TORCH)),--index-url https://download.pytorch.org/whl/cpu) "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps -e .
	touch $@

mini-model: $(STAMP)
	$(PY) -m lavic_utils mini-model

bench: $(STAMP)
	$(PY) -m lavic_utils bench

notebooks: $(STAMP)
	$(PY) -m lavic_utils notebooks execute

readme: $(STAMP)
	$(PY) docs/readme.py

# All plates on one sheet, to look at: docs/_build/gallery.png.
gallery: $(STAMP)
	$(PY) docs/gallery.py

lock: $(STAMP)
	$(PY) -m lavic_utils environment

lab: $(STAMP)
	$(PY) -m jupyter lab notebooks

# The page needs what stands in its own lock on top of the environment: installed at the first call.
demo: $(DEMO)
	$(PY) -m lavic_utils demo --profile $(PROFILE)

$(DEMO): requirements-demo.lock $(STAMP)
	$(PY) -m pip install --quiet --no-deps -r requirements-demo.lock
	touch $@

clean:
	rm -rf $(VENV) $(BOOK) $(CURDIR)/docs/_build $(CURDIR)/.cache $(CURDIR)/data $(CURDIR)/build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find lavic_utils tests -name __pycache__ -type d -prune -exec rm -rf {} +
