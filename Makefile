# Everything a person runs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH_VENV ?= .venv-bench
# FBGEMM 1.X goes with torch 2.(X+5) and fails to import beside any other.
BENCH_PEERS ?= "torch==2.14.*" "fbgemm-gpu-cpu==1.9.*"
# TorchRec 1.X goes with FBGEMM 1.X; with its dependencies it would bring the CUDA build of that.
TORCHREC ?= "torchrec==1.9.*"
TORCHREC_NEEDS ?= tensordict "torchmetrics==1.0.3" tqdm pyre-extensions iopath
# Such as OPTIONS=--quick; `dlrm-rs bench --help` lists them.
OPTIONS ?=
WHEELS := target/wheels
SOURCES := $(shell find rust python -name '*.rs' -o -name '*.py' -o -name '*.pyi' -o -name '*.toml') \
	Cargo.toml Cargo.lock pyproject.toml README.md
TORCH_VERSIONS ?= 2.6.0 2.11.0 newest
DOCS_VENV ?= .venv-docs

.DEFAULT_GOAL := help
.PHONY: help wheel demo bench bench-rust bench-python bench-latency bench-dlrm quality test test-rust test-python test-torch test-fbgemm test-torchrec test-gpu test-neon lint docs format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.installed ## Train a DLRM on real flights with torch's tables and with ours, and compare
	$(BIN)/dlrm-rs demo

wheel: $(WHEELS)/.built ## Build the wheel into target/wheels

bench: $(BENCH_VENV)/.installed ## Time lookups and training steps beside torch, FBGEMM and NumPy (OPTIONS=--quick: in two minutes)
	$(BENCH_VENV)/bin/dlrm-rs bench $(OPTIONS)

bench-rust: | cargo ## Time the engine alone: levels, row formats, dims, small calls, allocations
	cargo bench --package dlrm-benches

bench-python: $(VENV)/.installed ## Time the modules as users call them
	$(BIN)/python -m pytest benches

bench-latency: $(VENV)/.installed ## Time small requests one by one, the median and the slowest hundredth
	$(BIN)/python benches/latency.py $(OPTIONS)

bench-dlrm: $(VENV)/.installed ## Time a DLRM's training step part by part, with our tables and with torch's
	$(BIN)/python benches/dlrm_step.py $(OPTIONS)

quality: $(VENV)/.installed ## Train in every row format, and compare what the models predict (OPTIONS=--quick: in a minute)
	$(BIN)/python benches/quality.py $(OPTIONS)

test: test-rust test-python ## Run every test: cargo, then pytest on the installed wheel

test-rust: | cargo
	cargo test --package dlrm-core --package dlrm-benches

test-python: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile
	$(BIN)/python -m pytest --doctest-modules --ignore-glob='*/sides/fbgemm_*.py' --pyargs dlrm_rs

test-torch: $(WHEELS)/.built ## Run pytest on the one wheel under torch 2.6.0, 2.11.0 and the newest
	set -e; for version in $(TORCH_VERSIONS); do tests/run_with_torch.sh $$version $(WHEELS)/*.whl; done

test-fbgemm: $(BENCH_VENV)/.installed ## Compare packed rows with FBGEMM's, byte for byte
	$(BENCH_VENV)/bin/pip install --quiet --group test
	$(BENCH_VENV)/bin/python -m pytest tests/test_packed.py

test-torchrec: $(BENCH_VENV)/.installed ## Replace TorchRec's collections and models, and compare
	$(BENCH_VENV)/bin/pip install --quiet --group test $(TORCHREC_NEEDS)
	$(BENCH_VENV)/bin/pip install --quiet --no-deps $(TORCHREC)
	$(BENCH_VENV)/bin/python -m pytest tests/test_torchrec.py

test-gpu: $(VENV)/.installed ## Run the tests that need a GPU, and the bench of the pipeline on small tables
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benches/hybrid.py --quick

test-neon: ## Run the engine's tests for aarch64 under emulation (installs Debian packages; needs root)
	rust/test_neon.sh

lint: $(VENV)/.installed | cargo ## Check formatting, lints, types and the stub
	cargo fmt --check
	cargo clippy --workspace --all-targets -- --deny warnings
	$(BIN)/ruff format --check python tests benches
	$(BIN)/ruff check python tests benches
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest dlrm_rs._dlrm_rs

docs: ## Build the documentation into target/docs; a warning is an error
	[ -d $(DOCS_VENV) ] || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --upgrade pip
	$(DOCS_VENV)/bin/pip install --quiet --group docs
	$(DOCS_VENV)/bin/mkdocs build --strict

format: $(VENV)/.installed | cargo ## Format all code
	cargo fmt
	$(BIN)/ruff format python tests benches
	$(BIN)/ruff check --fix python tests benches

clean: ## Remove what was built
	rm -rf target $(VENV) $(BENCH_VENV) $(DOCS_VENV) .venv-torch-*

.PHONY: cargo
cargo:
	@command -v cargo >/dev/null || { echo "dlrm_rs is built by Rust 1.89 or newer: install it with rustup"; exit 1; }

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.14,<2"
	touch $@

$(WHEELS)/.built: $(SOURCES) $(VENV)/.made | cargo
	rm -rf $(WHEELS)
	$(BIN)/maturin build --release --locked --out $(WHEELS)
	touch $@

# Apart, so that `make --jobs` downloads it while the wheel is built.
$(VENV)/.needed: pyproject.toml $(VENV)/.made
	$(BIN)/pip install --quiet --group test --group bench --group lint torch
	touch $@

$(VENV)/.installed: $(WHEELS)/.built $(VENV)/.needed
	$(BIN)/pip install --quiet "$$(ls $(WHEELS)/*.whl)[demo]"
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(WHEELS)/*.whl
	touch $@

$(BENCH_VENV)/.installed: $(WHEELS)/.built
	[ -d $(BENCH_VENV) ] || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/pip install --quiet $(BENCH_PEERS) "$$(ls $(WHEELS)/*.whl)[bench]"
	$(BENCH_VENV)/bin/pip install --quiet --force-reinstall --no-deps $(WHEELS)/*.whl
	touch $@
