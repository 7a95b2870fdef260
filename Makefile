# `make demo` and `make test` each make their environment by themselves; without network once that is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo test soak bench bench-peers setup nginx clean

setup: $(READY)

# torch first and pinned, so that a CPU build that is at hand serves and nothing larger is fetched
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,data,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m simulations demo --out $(OUT)

# What tests a deployed federation needs nginx and is skipped by name without it.
nginx:
	@PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -q -y --no-install-recommends nginx-light; } \
	  || echo "nginx is not there: the tests of a deployed federation are skipped (Debian: apt-get install nginx-light)"

# two processes with a thread each: most of the time a deployed federation is waited for
test: $(READY) nginx
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile --cov --cov-report=term

# a hundred hospitals over twenty rounds: whether anything is left behind
soak: $(READY)
	$(BIN)/python -m pytest -m soak

bench: $(READY)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.private_step

# makes an environment for each peer in runs/peers, of about 1.5 GB where it has torch
bench-peers: $(READY)
	$(BIN)/python -m benchmarks.peers

clean:
	rm -rf $(VENV) build dist runs
