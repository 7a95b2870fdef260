# `make demo` and `make test` each make their environment by themselves; without network once that is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo test bench bench-peers setup clean

setup: $(READY)

# torch first and pinned, so that a CPU build that is at hand serves and nothing larger is fetched
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,data,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m simulations demo --out $(OUT)

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --cov --cov-report=term

bench: $(READY)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.private_step

# makes an environment for each peer in runs/peers, of about 1.5 GB where it has torch
bench-peers: $(READY)
	$(BIN)/python -m benchmarks.peers

clean:
	rm -rf $(VENV) build dist runs
