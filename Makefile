# Two commands are all: `make book` and `make test`. Everything else serves them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: book test notebooks clean

book: $(READY)  ## execute the chapters and build the site
	@$(BIN)/python tools/build_book.py

test: book  ## tests, notebooks and site checks
	@$(BIN)/ruff check umeta_core tests tools benchmarks notebooks book/_ext
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest tests notebooks/*.ipynb -q -n 2 --dist loadfile \
		--nbval-lax --nbval-cell-timeout 300 --durations 10

notebooks: book  ## write notebooks/ from the chapters
	@$(BIN)/python tools/write_notebooks.py

clean:  ## remove the built site and its caches, not the environment
	rm -rf _build

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) tools/check_python.py
	@echo "Installing into .venv (once; PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@
