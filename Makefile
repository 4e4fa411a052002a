# Two commands: make demo (the quick study on drawn faces) and make test (everything that is checked).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
MODEL ?= model
WORKERS ?= 3
# Threads that spin for long while they wait for each other make a busy machine crawl.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000

.PHONY: help demo model test test-slow check format notebooks docs wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv, run the ten-hypothesis study on drawn faces, print the report's path"
	@echo "make test       install with development extras; run every notebook's tests, pytest, and the checks"
	@echo "make test-slow  the tests that take longer than a few minutes"
	@echo "make wheel      build the wheel, in dist/"
	@echo "make model      train the model that ships with the package again (half an hour on two cores)"
	@echo "make check      clean notebooks, exported library, direction of imports, style: what needs no test to run"
	@echo "make format     format notebooks and tests, and export the library"
	@echo "make docs       build the site of the notebooks and the API into _docs, and check its links"
	@echo "make notebooks  execute the library's notebooks again, clean them, export the library and the README"

# torch and torchvision must come together: a torchvision of another build cannot be imported.
$(VENV)/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	@touch $@

demo: $(VENV)/installed
	test -f $(DEMO)/store/manifest.json || $(BIN)/facevae pack synthetic --count 1500 --seed 0 --size 72 --out $(DEMO)/store
	$(BIN)/facevae ablate --data $(DEMO)/store --out $(DEMO)/sweep --preset quick

model: $(VENV)/installed
	test -f $(MODEL)/store/manifest.json || $(BIN)/facevae pack synthetic --count 12000 --seed 1 --size 72 --out $(MODEL)/store
	$(BIN)/facevae train --hypothesis H9 --data $(MODEL)/store --out $(MODEL)/run --set steps=12000 --set validate_every=1000 --set checkpoint_every=1000 --set log_every=100 --set val_images=500 --set test_images=0
	$(BIN)/facevae directions $(MODEL)/run/model --data $(MODEL)/store
	mkdir -p facevae/models/drawn-faces
	install -m 644 $(MODEL)/run/model/* facevae/models/drawn-faces/

# Three tests at a time, each in one thread: most wait for processes that they have started. WORKERS=0 runs
# one after the other.
test: check notebooks-test
	$(BIN)/pytest -q -n $(WORKERS) tests

test-slow: $(VENV)/installed-dev $(VENV)/installed-docs
	$(BIN)/pytest -q -n $(WORKERS) --run-slow tests

check: $(VENV)/installed-dev
	$(BIN)/python tests/check_repository.py

notebooks-test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS)

notebooks: $(VENV)/installed-dev
	for notebook in $$(find nbs -name '[0-9]*.ipynb' | sort); do $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.store_widget_state=False --inplace $$notebook || exit 1; done
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tests/readme_images.py
	$(BIN)/python tests/check_repository.py --write-readme

wheel: $(VENV)/installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

format: $(VENV)/installed-dev
	$(BIN)/ruff format nbs tests setup.py
	$(BIN)/nbdev_export

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "_docs/index.html"

clean:
	rm -rf build dist *.egg-info _proc _docs .cache
