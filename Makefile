# Everything a fresh clone needs: each target makes .venv when it is missing and installs what it uses, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed-run
	$(BIN)/fastmrcnn demo

# A process per core: the interpreter of kernels, which takes much of the time, uses one.  And glibc keeps what tensors
# free: to ask the system for it again, page by page, takes an eighth of the time.
KEEP := MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456

test: $(VENV)/.installed-test
	$(KEEP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch and the rest into $(VENV): some minutes, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# The stamp of each extra also renews the editable install, so a changed pyproject.toml reaches all of them.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch and the rest into $(VENV): some minutes, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@
