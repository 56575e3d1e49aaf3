python ?= python3

.PHONY: install test lint layouts faults parity kernels quickstart

install:
	$(python) -m pip install -e '.[test]' ruff==0.17.6

test:
	$(python) -m pytest

lint:
	$(python) -m ruff check .

# Every layout is one device; minutes.
layouts:
	$(python) -m pytest --dist worksteal tests/plan/verify_matrix.py tests/nn/dispatch_matrix.py

# Several real processes that are killed, stuck, slow, or lose their disk, and one run through twenty kills; half an hour.
faults:
	$(python) -m pytest -n 0 tests/processes/faults.py
	$(python) -m tests.processes.soak --kills 20 --processes 4

# Live comparison with transformers, which the default tests replace by kept logits.
parity:
	$(python) -m pip install torch==2.13.0 'transformers>=5' accelerate 'peft>=0.19' -e '.[eval]'
	$(python) -m pytest tests/parity tests/eval/test_harness.py

# Kernels compiled for five TPU chips without one; the tables of docs/kernels.md, written anew.
kernels:
	$(python) -m pip install -e '.[tpu]'
	$(python) -m pytest tests/plan/test_compiled.py tests/kernels/test_compile_tpu_*.py
	$(python) -m tests.kernels.support

quickstart:
	$(python) experiments/pretrain.py --gin_file=quickstart.gin
