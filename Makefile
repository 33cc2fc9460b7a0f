# make demo      install into .venv, make a comparison sheet with the model that ships, print where it is
# make test      install into .venv, check style and types, run the tests
# make models    fetch the emoji and train the models and the controls on them into runs/; meant for a GPU
# make evidence  measure every plug-in on the models that ship into docs/evidence.md and the pages that it links, by
#                make plugins, steering, latents, classifiers and controls; rows that are there are kept
# make docs      build the documentation into build/site/
# make wheel     build the wheel into dist/
#
# Needs Python 3 and make only. What is done already is not done again: the stamps in .venv depend on pyproject.toml and
# constraints.txt. VENV=folder uses another environment, PYTHON=python3.12 another interpreter.

PYTHON ?= python3
VENV ?= .venv
PYTEST_OPTIONS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.stamp-installed
TESTABLE := $(VENV)/.stamp-testable
QUANTISED := $(VENV)/quantised

.PHONY: demo docs evidence plugins steering latents classifiers controls models test lint types pytest wheel clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/trimtab generate "grinning face, twemoji style" --compare --seeds 0-5 --steps 25 --guidance-scale 1 \
		--guidance cfg:scale=3 --guidance pag:scale=2,layers=up -o out

test: lint types pytest

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTABLE)
	MYPYPATH=$(VENV)/typing $(BIN)/mypy

# Numbers that others published, to the last digits: on some processors MKL's products depend on how many rows there are.
EXACT := tests/adapters/test_easycontrol.py tests/pipelines/test_pag_parity.py

pytest: $(TESTABLE) $(QUANTISED)
	MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest $(PYTEST_OPTIONS) $(EXACT)
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) $(EXACT:%=--ignore=%)
	PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest tests/coexistence/test_quantised.py

# Sized for a GPU. A run that was stopped continues where it was.
EMOJI := runs/emoji.safetensors
PAIRS := runs/emoji-edges
TRAIN := $(BIN)/trimtab train
GPU := --mixed-precision bf16

$(EMOJI): | $(INSTALLED)
	mkdir -p runs/npm
	cd runs/npm && npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
	$(BIN)/python -m trimtab.pipelines.emoji.pack runs/npm $@

models: $(EMOJI)
	$(TRAIN) emoji-autoencoder --batch-size 64 --steps 6000 $(GPU)
	for target in category style; do for seed in 0 1; do \
		$(TRAIN) emoji-judge --target $$target --seed $$seed --output runs/emoji-judge-$$target-$$seed $(GPU) && \
		$(TRAIN) emoji-judge --target $$target --seed $$seed --noisy 1 --output runs/emoji-noisy-$$target-$$seed $(GPU) \
		|| exit 1; done; done
	$(TRAIN) emoji-clip $(GPU)
	$(TRAIN) emoji-sd $(GPU)
	$(TRAIN) emoji-flux --copies 8 $(GPU)
	test -d $(PAIRS) || $(BIN)/python -m trimtab.pipelines.emoji.pairs $(EMOJI) $(PAIRS)
	$(TRAIN) easycontrol --base runs/emoji-flux/model --data $(PAIRS)/train --output runs/emoji-easycontrol --rank 32 \
		--cond-size 64 --smallest 64 --largest 64 --aspect 1 --max-sequence-length 32 --batch-size 64 --steps 6000 \
		--learning-rate 1e-3 $(GPU)
	$(TRAIN) unicon --base runs/emoji-sd/model --data $(PAIRS)/train --output runs/emoji-unicon --rank 16 --size 64 \
		--aspect 1 --crop 0 --trigger "edge_map, " --batch-size 64 --steps 6000 --learning-rate 1e-3 $(GPU)
	$(TRAIN) smooth --base runs/emoji-sd/model --data $(PAIRS)/train --output runs/emoji-smooth --size 64 --crop 0 \
		--batch-size 32 --accumulate 1 --steps 3000

# Rows that are there are kept. MEASURED=folder measures all of them into another folder; without runs/evidence and
# runs/classifiers their images and networks are made anew too. How long each takes: benchmarks/README.md.
MEASURED ?= docs
WEAK := runs/evidence/weak/model
FASHION := --autocast
WORDS := --count 270 --batch 45 --autocast
STEERING := --count 500 --steps 10 --autocast
LATENTS := --count 24 --tuning 4 --batch 24 --steps 10
CLASSIFIERS := --count 500 --autocast
EXPERTS := --count 500 --autocast
CONTROLS := --count 100
COSTS := --turns 3
KNOWN := --categories 'Smileys & Emotion,Animals & Nature,Food & Drink'
BENCHMARK := OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

evidence: plugins steering latents classifiers controls
	$(BENCHMARK).evidence --page --taken $(MEASURED) --output $(MEASURED)/evidence

# Rows of another model: python -m benchmarks.evidence --model FOLDER --output docs/evidence ...
plugins: $(TESTABLE) $(EMOJI)
	$(TRAIN) base --steps 300 --batch-size 32 --warmup 30 --ema-decay 0.98 --output runs/evidence/weak $(GPU)
	$(BENCHMARK).evidence --weak $(WEAK) $(FASHION) --output $(MEASURED)/evidence
	$(BENCHMARK).evidence --model trimtab/emoji-sd --emoji $(EMOJI) --guidance-scale 1 \
		--features trimtab/emoji-judge-category-1 $(WORDS) --output $(MEASURED)/evidence
	$(BENCHMARK).evidence --model trimtab/emoji-flux --emoji $(EMOJI) --guidance-scale 1 --size 64 \
		--features trimtab/emoji-judge-category-1 $(WORDS) --output $(MEASURED)/evidence

steering: $(TESTABLE)
	$(BENCHMARK).steering $(STEERING) --output $(MEASURED)/steering

latents: $(TESTABLE) $(EMOJI)
	$(BENCHMARK).latents trimtab/emoji-sd $(LATENTS) --output $(MEASURED)/latents

classifiers: $(TESTABLE)
	$(BENCHMARK).classifiers $(CLASSIFIERS) --output $(MEASURED)/classifiers
	$(BENCHMARK).experts $(EXPERTS) --output $(MEASURED)/experts

controls: $(TESTABLE) $(EMOJI)
	$(BENCHMARK).controls --flux trimtab/emoji-flux --easycontrol models/emoji-easycontrol/easycontrol.safetensors \
		$(KNOWN) $(CONTROLS) --output $(MEASURED)/controls-easycontrol
	$(BENCHMARK).controls --sd trimtab/emoji-sd --unicon trimtab/emoji-unicon \
		$(KNOWN) $(CONTROLS) --output $(MEASURED)/controls-unicon
	$(BENCHMARK).controls --sd trimtab/emoji-sd --smooth models/emoji-smooth/smooth_lora.safetensors \
		$(KNOWN) $(CONTROLS) --output $(MEASURED)/controls-smooth
	$(BENCHMARK).evidence_controls $(COSTS) --output $(MEASURED)/evidence-controls.json

docs: $(TESTABLE)
	$(BIN)/python -m mkdocs build --strict

wheel: $(TESTABLE)
	rm -rf build
	$(PIP) wheel --no-deps --wheel-dir dist .
	rm -rf build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(TESTABLE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[test,docs]'
	mkdir -p $(VENV)/typing
	ln -sfn "$(CURDIR)" $(VENV)/typing/trimtab
	touch $(INSTALLED) $@

# Beside the environment, because Diffusers imports torchao wherever it is installed, and that writes to the terminal.
$(QUANTISED): pyproject.toml constraints.txt | $(TESTABLE)
	$(PIP) install --constraint constraints.txt --no-deps --upgrade --target $@ torchao
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
