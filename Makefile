# Each target makes its own environment in .venv when there is none.
PYTHON ?= python3
TORCH  ?= torch==2.13.0  # before the rest, or machines without a GPU pull gigabytes of CUDA packages
BIN    := .venv/bin
JOBS   ?= 2  # tests at once; each is one thread

quickstart: $(BIN)/.installed
	$(BIN)/personalize quickstart

web: $(BIN)/.web  # the page, in a browser; WORKSPACE=FOLDER: another folder than this one
	$(BIN)/personalize web $(or $(WORKSPACE),.)

test: $(BIN)/.installed  # with bytecode kept: the tests start 40 processes, each of which would compile the package anew
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -q -m slow

clients: $(BIN)/.installed  # fills .venv-clients/, 2.3 GB, on first use
	$(BIN)/python -m pytest -q -m clients tests/clients

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Everything that only a GPU can say, to docs/gpu/: `make gpu`, or with any of VENV=FOLDER (an environment that is there, used
# as it is), PARTS="step memory/sdxl", LIMIT=540 (seconds; the same command goes on), AGAIN=1 (failed parts too), OUT=FOLDER, WORK=FOLDER,
# PEERS="DIR/train_dreambooth.py DIR/train_dreambooth_lora.py"; DEVICE=cpu SIZE=tiny is a rehearsal.
gpu: $(if $(VENV),,$(BIN)/.installed)
	$(if $(VENV),$(VENV)/bin/python3,$(BIN)/python) -m benchmarks.gpu --device $(or $(DEVICE),cuda) --size $(or $(SIZE),full) \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(AGAIN),--again) $(if $(OUT),--out $(OUT)) $(if $(WORK),--work $(WORK)) \
	  $(foreach part,$(PARTS),--part $(part)) $(foreach script,$(PEERS),--peer $(script))

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(BIN)/.web: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[web]'
	touch $@

.PHONY: quickstart web test test-slow clients check gpu
