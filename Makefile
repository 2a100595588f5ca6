# Everything on a fresh machine: each target makes its own virtual environment first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
# two at a time: the tests' processes have one thread each; a file's tests share what they build, so they stay together, and long
# files are not left for the end
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all test-gpu test-extras defects lint bench bench-data clean setup

demo: .venv/ready
	$(BIN)/python cli.py run

test: .venv/ready
	$(PYTEST) -m "not slow"

test-slow: .venv/ready
	$(PYTEST) -m slow

test-all: .venv/ready
	$(PYTEST)

# on a machine with a CUDA GPU; with bitsandbytes installed also bases and optimisers in 8 and 4 bits
test-gpu: .venv/ready
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_8bit.py

# what only extras bring, in an environment of its own: bitsandbytes slows every start of peft by a second
test-extras: .venv/ready
	test -x .venv-extras/bin/python || $(PYTHON) -m venv --system-site-packages .venv-extras
	echo "$(CURDIR)/$$(echo .venv/lib/python*/site-packages)" > $$(echo .venv-extras/lib/python*/site-packages)/base.pth
	.venv-extras/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt bitsandbytes gradio tensorboard wandb \
		dvc-s3 'moto[server]' optuna
	.venv-extras/bin/python -m pytest tests/test_8bit.py tests/test_play.py tests/test_boards.py tests/test_share_s3.py tests/test_search.py

# does each test of a known defect see it? By putting the defect back
defects: .venv/ready
	$(BIN)/python tests/defects.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	$(BIN)/python bench/train.py

bench-data: .venv/ready
	$(BIN)/python bench/data.py

# Nothing that took work: adapters in .dvc/cache, checkpoints in .work and runs in mlruns stay.
clean:
	rm -rf build reports dist .dvc/tmp .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

setup: .venv/ready

# The constraints pin every version; with no GPU, put a CPU build of torch into .venv first to save the CUDA packages.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
