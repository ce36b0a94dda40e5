# make demo   the main job on the model that ships here
# make test   lint, types, import layers, tests
# make test-slow   the tests that take longer than all that
# make loaders   exports under other versions of transformers; needs the package index
# PYTHON=python3.12 make …   chooses the interpreter (3.10 to 3.13)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TOKENIZERS_PARALLELISM = true

.PHONY: demo test pytest test-slow loaders lint lock clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

# Side by side: most of lint keeps one core busy, and tests wait for each other at their beginning and end.
test: $(READY)
	$(MAKE) -j2 lint pytest

# Three at a time for two cores, one thread each: tests are mostly small models, and some wait for their own processes.
pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# Do exports load, and answer alike, under other versions of transformers? Needs the package index; before a release.
loaders: $(READY)
	$(BIN)/python scripts/loaders.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The environment is made again when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pins for every supported Python and platform in one file; needs `uv` on the path.
lock:
	echo 'torch==2.13.0' | uv pip compile --universal --python-version 3.10 --no-annotate --no-header \
		--extra dev --constraint - pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) .demo .loaders .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
