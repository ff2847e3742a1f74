# `make help` says what there is. Needs python3 (3.11 or newer), make and git; the rest goes into .venv on the first call.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# The pip that installs the rest: the one in a new environment may be years old.
PIP := 26.1.2
SETUP := $(VENV)/.installed$(if $(CONSTRAINTS),,-unconstrained)

# The clone may lie in a folder whose name has spaces and quotes: a path goes into a recipe through `quote`.
quote = '$(subst ','\'',$(1))'
TOOLS = $(call quote,$(BIN))

.DEFAULT_GOAL := help
.PHONY: help train codec base test test-slow test-bits test-newest test-released test-llama test-gpu bench-gpu test-browser lint lab docs bench bench-transcribe scores prepare readme clean

define HELP
make train         train an adapter on the recordings in the package; runs/train holds it and the executed notebook
make codec         install what the codec of the released model needs
make base          pretrain the small base, in hours; needs the speech that nbs/runs/voices.ipynb makes in runs/voices
make test          run the notebooks and the tests, but for the slow ones
make test-slow     test what takes long: runs that are killed, resumed, swept or divided, three tutorials
make test-bits     test quantised bases and 8-bit optimizers, with bitsandbytes beside the virtual environment
make test-newest   test with the newest transformers, peft and accelerate that settings.ini allows
make test-released train the released configuration with random weights: 7 minutes, 24 GB of memory, 14 GB of disk
make test-llama    take the road of the released model with the tokenizer of Llama 3, which npm fetches
make test-gpu      test what only a GPU can show, the memory plan against its allocator included
make bench-gpu     measure training, generation and codec on a GPU of 40 GB or more, in 8 minutes
make test-browser  test the site and the widgets in a headless Chromium; needs chromium, node and npm
make lint          run formatter and linter, and check the floors and the counts of the pages
make lab           open the notebooks in JupyterLab
make docs          build the site into _docs, with Quarto if it is installed, else with smalldocs
make bench         run every benchmark in benchmarks/
make bench-transcribe  measure transcription and the check of texts, in an hour; needs the extra eval
make scores        measure the scores of the small base again, into runs/scores: hours; needs the extra eval
make prepare       after an edit in nbs/: export the package, clean the notebooks, write README.md
make clean         remove what was built; .venv and runs/ stay

Each target sets up .venv if it is missing, or if settings.ini, setup.py or constraints.txt has changed.
  ARGS="..."           more arguments, e.g. make test ARGS="-k codec -x"
  WORKERS=0            run make test in one process, which shows tests as they go
  PYTHON=python3.12    the Python that makes .venv (remove .venv to change it)
  CONSTRAINTS=         install other versions than the tested ones, e.g. for your GPU: make CONSTRAINTS= train
On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves several GB of CUDA libraries.
endef

help:
	$(info $(HELP))
	@:

$(SETUP): settings.ini setup.py $(CONSTRAINTS)
	@$(PYTHON) tools/python_version.py
	@echo "setting up $(VENV): the first time this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed*
	@$(TOOLS)/python -m pip install -qq --disable-pip-version-check pip==$(PIP)
	@$(TOOLS)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev,docs]"
	@touch $@

train: $(SETUP)
	$(TOOLS)/higgs_run train --out runs/train $(ARGS)

# torchaudio's wheel is built for another torch; nothing here uses its compiled parts.
codec: $(SETUP)
	$(TOOLS)/pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --no-deps torchaudio
	rm -f $(VENV)/lib/python*/site-packages/torchaudio/lib/*.so

# A small base, from scratch, in hours; runs/voices holds the speech that nbs/runs/voices.ipynb makes.
base: $(SETUP)
	@test -f runs/voices/codes.safetensors || { echo 'make base: runs/voices holds no speech yet: nbs/runs/voices.ipynb says how it is made' >&2; exit 1; }
	$(TOOLS)/higgs_run pretrain --out runs/pretrain -p voices=$(call quote,$(CURDIR)/runs/voices/codes.safetensors) $(ARGS)

# The class of the released codec imports torchaudio, whose wheel is built for a CUDA torch; it runs without its compiled parts. It lies apart, and
# without a network the tests of that class are skipped.
CODEC := $(VENV)/codec
$(CODEC)/torchaudio: $(SETUP)
	-$(TOOLS)/pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --no-deps --upgrade --target $(CODEC) torchaudio && rm -f $(CODEC)/torchaudio/lib/*.so && touch $@

# A file of tests is one worker's. Their models are tiny, so that a thread each is enough.
WORKERS ?= logical
test: $(SETUP) $(CODEC)/torchaudio
	OMP_NUM_THREADS=1 PYTHONPATH="$$(mkdir -p $(CODEC) && cd $(CODEC) && pwd)" $(TOOLS)/pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(SETUP) $(CODEC)/torchaudio
	OMP_NUM_THREADS=1 PYTHONPATH="$$(mkdir -p $(CODEC) && cd $(CODEC) && pwd)" $(TOOLS)/pytest -m slow -n $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

# Where bitsandbytes is installed, peft loads it with every start; so it lies apart.
test-bits: $(SETUP)
	$(TOOLS)/pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --no-deps --upgrade --target $(VENV)/bits bitsandbytes
	OMP_NUM_THREADS=1 PYTHONPATH="$$(cd $(VENV)/bits && pwd)" $(TOOLS)/pytest -m bits $(ARGS)

# These three change what a run does, so the newest versions that settings.ini allows are tested too, beside the tested set for all else.
NEWEST := $(VENV)-newest
FLOATING := transformers|peft|accelerate|huggingface_hub|tokenizers|safetensors
test-newest: settings.ini setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv "$(NEWEST)"
	grep -v -i -E '^($(FLOATING))==' $(or $(CONSTRAINTS),/dev/null) > "$(NEWEST)/constraints.txt" || true
	"$(NEWEST)/bin/pip" install -qq --disable-pip-version-check --upgrade --upgrade-strategy only-if-needed -c "$(NEWEST)/constraints.txt" transformers peft accelerate -e ".[dev,docs]"
	"$(NEWEST)/bin/pip" list --disable-pip-version-check | grep -i -E '^($(FLOATING)) '
	OMP_NUM_THREADS=1 "$(NEWEST)/bin/pytest" -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-released: $(SETUP)
	$(TOOLS)/pytest -s -m released tests/test_released.py $(ARGS)

# The tokenizer is under the Llama Community License: npm brings it into ~/.cache, never into the repository.
test-llama: $(SETUP) $(CODEC)/torchaudio
	OMP_NUM_THREADS=1 PYTHONPATH="$$(mkdir -p $(CODEC) && cd $(CODEC) && pwd)" $(TOOLS)/pytest -m llama tests/test_released_road.py $(ARGS)

# What is installed for the GPU: CONSTRAINTS= takes the newest torch, a constraint file of your own another one.
test-gpu: $(SETUP)
	$(TOOLS)/pytest tests/test_gpu.py $(ARGS)

bench-gpu: $(SETUP)
	$(TOOLS)/python benchmarks/gpu.py $(ARGS)

# The browser is the system's, its driver and axe-core come from npm. `make test` leaves these tests out.
CHROMIUM ?= $(or $(shell command -v chromium),$(shell command -v chromium-browser),$(shell command -v google-chrome))
test-browser: $(SETUP)
	@test -x "$(CHROMIUM)" || { echo "make test-browser: no Chromium. On Debian: apt-get install chromium; else name it: make CHROMIUM=/path test-browser" >&2; exit 1; }
	@command -v npm >/dev/null || { echo "make test-browser: no npm. On Debian: apt-get install nodejs npm" >&2; exit 1; }
	npm ci --prefix tests/browser --no-audit --no-fund
	$(TOOLS)/pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[browser]"
	CHROMIUM="$(CHROMIUM)" $(TOOLS)/pytest -m browser tests/test_browser.py $(ARGS)

# `make test` runs the first two as well; `ruff format .` mends the first.
lint: $(SETUP)
	$(TOOLS)/ruff format --check .
	$(TOOLS)/ruff check .
	$(TOOLS)/python tools/house.py
	PATH=$(TOOLS):"$$PATH" $(TOOLS)/python tools/counts.py

lab: $(SETUP)
	$(TOOLS)/jupyter-lab nbs $(ARGS)

# tools/pages.py writes the pages into _proc, with nbdev, and Quarto or smalldocs makes HTML of them.
docs: $(SETUP)
	PYTHONWARNINGS=ignore::UserWarning $(TOOLS)/python tools/pages.py
	if command -v quarto >/dev/null; then quarto render _proc --no-execute; else $(TOOLS)/smalldocs render _proc; fi
	rm -rf _docs && mv _proc/_docs _docs
	@echo "the site is in _docs: $(PYTHON) -m http.server -d _docs"

bench: $(SETUP) $(CODEC)/torchaudio
	@ls benchmarks/*.py >/dev/null || { echo "make bench: no benchmark in benchmarks/" >&2; exit 1; }
	@set -e; for benchmark in $(filter-out benchmarks/small_base.py benchmarks/base_voices.py benchmarks/history.py benchmarks/gpu.py benchmarks/transcribe.py,$(wildcard benchmarks/*.py)); do echo "== $$benchmark"; PYTHONPATH="$$(mkdir -p $(CODEC) && cd $(CODEC) && pwd)" $(TOOLS)/python "$$benchmark" $(ARGS); done

bench-transcribe: $(SETUP)
	$(TOOLS)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[eval]"
	$(TOOLS)/python benchmarks/transcribe.py $(ARGS)

scores: $(SETUP)
	$(TOOLS)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[eval]"
	$(TOOLS)/python benchmarks/small_base.py $(if $(wildcard runs/voices/codes.safetensors),--voices runs/voices) $(ARGS)
	$(TOOLS)/python benchmarks/history.py

prepare: $(SETUP)
	$(TOOLS)/nbdev_export
	$(TOOLS)/nbdev_clean
	$(TOOLS)/python tools/views.py
	@$(MAKE) --no-print-directory readme

readme: $(SETUP)
	$(TOOLS)/python tools/readme.py

clean:
	rm -rf build dist _proc _docs nbs/nbdev.yml *.egg-info .pytest_cache .hypothesis
	find higgs_nb nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
