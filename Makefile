PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 5

.PHONY: setup demo test nightly lint bench fuzz cuda

setup: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[tests,demo,peers]'
	touch $@

# What the demo needs, without the tests' packages.
.venv/demo: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

demo: $(if $(wildcard .venv/installed),.venv/installed,.venv/demo)
	$(BIN)/python examples/demo/data.py data/demo
	$(BIN)/python examples/demo/baselines.py data/demo/train data/demo/test data/demo_baselines.jsonl
	$(BIN)/flipscale study race examples/demo/demo_path.yaml examples/demo/demo.yaml examples/demo/demo_clip.yaml --minutes $(MINUTES) --output_dir runs/demo --baselines data/demo_baselines.jsonl
	$(BIN)/flipscale prepare embed data/demo/train runs/demo/memory --model runs/demo/model
	$(BIN)/flipscale evaluate runs/demo/model --task '{kind: zero_shot_memory, data: data/demo/test, memory: runs/demo/memory, neighbours: [16], weights: [0.4]}'
	$(BIN)/flipscale search runs/demo/model data/demo/test --queries examples/demo/queries.txt --out runs/demo/search.html

# Three processes on two cores, because tests wait for half of their time.
test: setup
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The tests marked `long` too, which `make test` leaves out.
nightly: export FLIPSCALE_LONG = all
nightly: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/photos.py data/photos
	$(BIN)/python benchmarks/data.py --shards data/photos/*

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds 300

# What torch.compile and Triton make for GPUs, and fp8 products, with the CUDA wheel of the same torch (6 GB), on a machine without a GPU.
cuda: export FLIPSCALE_LONG = all
cuda: .venv-cuda/installed
	.venv-cuda/bin/pytest -s tests/simulated/test_inductor.py
	.venv-cuda/bin/pytest tests/objectives/test_contrastive_triton.py -k compile
	.venv-cuda/bin/pytest tests/benchmarks/test_products.py

# `===` leaves out builds for CPUs, whose versions end in +cpu.
.venv-cuda/installed: setup.cfg pyproject.toml .venv/installed
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check --editable . pytest pytest-timeout torchao torch===$$($(BIN)/python -c "import torch; print(torch.__version__.split('+')[0])")
	touch $@
