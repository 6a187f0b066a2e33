# Two commands are all: `make book` and `make test`. Everything else serves them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
unexport UMETA_RESULTS  # the book and its tests are about the records in results/

# The build executes each chapter; its notebook has the same code (tested), so that `test` executes only these.
EXECUTED := $(addprefix notebooks/,00_preface.ipynb 02_few_examples.ipynb 13_em.ipynb)
NBVAL := --nbval-lax --nbval-cell-timeout 300

.PHONY: book test test-notebooks notebooks clean

book: $(READY)  ## execute the chapters and build the site
	@$(BIN)/python tools/build_book.py

test: book  ## tests, notebooks and site checks
	@$(BIN)/ruff check umeta_core tests tools benchmarks notebooks book/_ext
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest tests $(EXECUTED) -q -n 2 --dist loadfile \
		$(NBVAL) --durations 10

test-notebooks: book  ## every notebook from its first cell to its last, as Colab would; 20 minutes
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest notebooks -q -n 2 --dist loadfile $(NBVAL) \
		--ignore notebooks/experiments

notebooks: book  ## write notebooks/ from the chapters
	@$(BIN)/python tools/write_notebooks.py

clean:  ## remove the built site and its caches, not the environment
	rm -rf _build

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) tools/check_python.py
	@echo "Installing into .venv (once; PyTorch is large)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@
