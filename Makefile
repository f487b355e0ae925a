# make demo | test | check | subset | long | proof | fuzz | memory | zoo | snapshots | examples | readme: each makes .venv
# first, once, from the pinned constraints.txt.
PYTHON := $(firstword $(foreach python,$(PYTHON) python3 python3.13 python3.12 python3.11,\
	$(shell $(python) -c 'import sys; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/.ready
CODE := autopar tests examples benchmarks

export OMP_NUM_THREADS ?= 1

.PHONY: demo test check subset long proof fuzz memory zoo snapshots examples readme clean

demo: $(READY)
	$(BIN)/autopar search llama3-8b --cluster 8x8:h100 --global-batch 512 --seq-len 8192
	$(BIN)/python examples/demo.py --out build/demo
	$(BIN)/autopar verify build/demo --model examples/demo.py:small_llama

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not proof and not long"

# A part of the proof that holds every value of every choice once, and training runs of minutes.
subset: $(READY)
	$(BIN)/python -m pytest -m proof

check: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

# Mixtures of experts and bytes on real ranks, searches by the hundred: with the others too long for continuous
# integration.
long: $(READY)
	$(BIN)/python -m pytest -m long

# All of it. One case alone: make proof ONLY="llama dp2 tp2 fp64 zero0 m2x1"
proof: $(READY)
	PYTHONPATH=tests $(BIN)/python -m proof --only "$(ONLY)"

# Drawn models under drawn plans, each against one device. One batch again: make fuzz SEED=1 BATCH=17
CASES ?= 300
SEED ?= 1
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases $(CASES) --seed $(SEED) $(if $(BATCH),--batch $(BATCH))

# Every architecture of benchmarks/zoo_models.py on 4 and 8 ranks. One alone: make zoo ONLY=llama
zoo: $(READY)
	$(BIN)/python benchmarks/zoo.py --configs benchmarks/zoo_models.py --ranks 4,8 --only "$(ONLY)"

# Bytes of every rank, measured and predicted.
memory: $(READY)
	PYTHONPATH=tests $(BIN)/python -m proof.memory

# After a change of what is emitted: rewrite the texts that tests compare it with, then read the difference.
snapshots: $(READY)
	$(BIN)/python tests/snapshots.py

examples: $(READY)
	$(BIN)/python examples/emitted.py

readme: $(READY)
	$(BIN)/python examples/refresh_readme.py

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "autopar needs Python 3.11 or newer; name it with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
