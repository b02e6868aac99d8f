# What a newcomer types. The environment lies in .venv and is made by the first target that needs it.

VENV := .venv
IN_ENV := . $(VENV)/bin/activate &&
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')

# glibc else gives large buffers back and asks for them again at every step, which takes 1.4 times as long
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
# a thread that waits sleeps; on a busy machine spinning ones take the cores from those that have something to do
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export HF_DATASETS_DISABLE_PROGRESS_BARS := 1
export TOKENIZERS_PARALLELISM := false
export DS_BUILD_OPS := 0
ifeq ($(GPU),0)
export DS_ACCELERATOR := cpu
endif

.PHONY: help env demo test test-slow lab notebooks

help:           ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

env: $(VENV)/ready      ## create .venv with everything that pyproject.toml states

# Without a GPU the CPU build of torch comes first, from PyTorch's own index; where that cannot be reached, the pin alone
# decides. PIP_EXTRA_INDEX_URL and the like hold for both.
$(VENV)/ready: pyproject.toml
	@python=$$(for p in python3.11 python3 python3.12 python3.13; do \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	if [ -z "$$python" ]; then \
	    echo "rlhfkit needs Python 3.11 or newer as python3.11 or python3; there is: $$(python3 --version 2>&1)"; exit 1; fi; \
	echo "making .venv with $$($$python --version): a minute or two"; \
	$$python -m venv --clear $(VENV) || { echo "$$python lacks venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
ifeq ($(GPU),0)
	@$(IN_ENV) pip install -qq --no-deps --retries 0 --timeout 15 --index-url $(CPU_INDEX) "$(TORCH)" 2>/dev/null \
	    || echo "PyTorch's CPU index could not be reached: $(TORCH) comes from pip's default index, perhaps with CUDA"
endif
	@$(IN_ENV) pip install -qq -e ".[dev]"
	@mkdir -p runs && touch $@

demo: env       ## notebooks 01 to 08 into runs/demo; DATA=<raw corpora> VOCAB=<vocab.model>: on yours, into runs/demo-data
	@$(IN_ENV) python notebooks/run.py demo $(if $(DATA),--data "$(DATA)") $(if $(VOCAB),--vocab "$(VOCAB)")

test: env       ## pytest, then nbval over all notebooks
	$(IN_ENV) pytest -q tests
	rm -rf runs/tiny
	$(IN_ENV) pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

test-slow: env  ## the tests marked slow: many kills, many seeds, every family through every stage
	$(IN_ENV) pytest -q -m slow tests

lab: env        ## JupyterLab on the notebooks, for this machine only, with a token
	$(IN_ENV) jupyter lab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. \
	    --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

notebooks: env  ## execute all notebooks and store their outputs, the only way that outputs are refreshed
	@$(IN_ENV) python notebooks/run.py refresh
