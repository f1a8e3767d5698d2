PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 7

.PHONY: setup demo test nightly lint bench fuzz

setup: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[tests,demo,peers]'
	touch $@

demo: setup
	$(BIN)/flipscale prepare demo data/demo
	$(BIN)/flipscale study race demo demo_clip --minutes $(MINUTES) --output_dir runs/demo --baselines
	$(BIN)/flipscale search runs/demo/model data/demo/test --queries flipscale/recipes/demo_queries.txt --out runs/demo/search.html

test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The tests marked `long` too, of which `make test` runs a sixth in turn.
nightly: export FLIPSCALE_LONG = all
nightly: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/flipscale prepare photos data/photos
	$(BIN)/python benchmarks/data.py --shards data/photos/*

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds 300
