# The study by one command each. `make help` lists them; README.md explains the variables.
#
#   make reproduce [PROFILE=smoke|cpu|quick|paper|FILE.yaml] [RUN=name] [DATA=synthetic|cifar100|PATH] [DEVICE=] [SEED=]
#                  [LIMIT=images per class] [VARIANT=v1|v2|v3] [SET="train.epochs=3 prune.lr=1e-3"]

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
FLAGS := $(filter-out --%,$(firstword -$(MAKEFLAGS)))# the one-letter ones, as -nk
MAKEFLAGS += --no-builtin-rules --no-print-directory

# Set here, so that only the command line gives them: DATA or SEED in somebody's environment is not meant for us.
PROFILE := smoke
RUN := $(basename $(notdir $(PROFILE)))
DATA :=
DEVICE :=
SEED :=
LIMIT :=
VARIANT :=
SET :=
JOBS :=
SCHEDULER :=
CHECKPOINT :=
OPT_LEVEL :=
OUT :=

ifneq ($(shell printf '%s' '$(RUN)' | grep -cE '^[A-Za-z0-9][A-Za-z0-9._-]*$$'),1)
$(error RUN='$(RUN)' is no folder name; use letters, digits, '.', '_' and '-')
endif
ifeq ($(RUN),pretrained)
$(error RUN='pretrained' is the folder of the shipped network; choose another name)
endif

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# For provenance.json; the inner make below must not replace it by its own.
MSUNET_COMMAND ?= $(strip make $(MAKECMDGOALS) $(MAKEOVERRIDES))
export MSUNET_COMMAND

quote = '$(subst ','\'',$1)'

##@ environment: PYTHON=..., else the active one, else .venv made from the first Python that will do

ifneq ($(PYTHON),)
PY := $(PYTHON)
else ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PY := $(call quote,$(or $(VIRTUAL_ENV),$(CONDA_PREFIX))/bin/python)
else
PY := .venv/bin/python
endif
ENVIRONMENT := $(if $(filter .venv/bin/python,$(PY)),.venv/.complete,.given)

.PHONY: .given .python
.given:
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(not (sys.version_info[:2] in ((3, 11), (3, 12)) \
	  and u.find_spec("torch") and u.find_spec("papermill")))' || { echo $(PY) 'is not Python 3.11 or 3.12 with the' \
	  'packages: -m pip install -r requirements.txt there, or unset PYTHON, VIRTUAL_ENV and CONDA_PREFIX' >&2; exit 1; }
.python: $(ENVIRONMENT)
	@echo $(PY)

# Shims exist that are found but do not run (pyenv), and Pythons that cannot make environments (Debian).
SUITABLE = -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1

# .making says that what stands there is unfinished, so a killed `make` starts it anew; an environment
# made by hand is completed and never removed.
.venv/.complete: requirements.txt pyproject.toml
	@set -e; \
	if [ -e .venv/.making ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! .venv/bin/python $(SUITABLE); then \
	  for python in python3.12 python3.11 python3 none; do if $$python $(SUITABLE); then break; fi; done; \
	  if [ $$python = none ]; then \
	    echo 'no Python 3.11 or 3.12 with venv found; install one (Debian: python3.12-venv) or give PYTHON=...' >&2; exit 1; \
	  fi; \
	  echo "making .venv from $$($$python --version)" >&2; \
	  rm -rf .venv; mkdir .venv; touch .venv/.making; $$python -m venv .venv; \
	fi; \
	touch .venv/.making; rm -f $@; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .; \
	mv .venv/.making $@

##@ the run: notebooks, each made anew when its code, profile, parameters or an earlier notebook changed

RUN_FOLDER := $(or $(MSUNET_RUNS),runs)/$(RUN)
PARAMETERS := $(strip $(foreach name,PROFILE RUN DATA DEVICE SEED LIMIT VARIANT,$(if $($(name)),-p $(name) $(call quote,$($(name)))))\
  $(if $(SET),-p OVERRIDES $(call quote,$(SET))))
RECORD := $(RUN_FOLDER)/.parameters

# Everything that a notebook imports. The site only shows what they left, runner.py only runs them.
SITE := $(addprefix msunet_core/study/,report.py claims.py pages.py shipped_page.py web.py)
CODE := $(sort $(filter-out %/__main__.py %/runner.py $(SITE),$(shell find msunet_core -name '*.py' -o -name '*.cpp')))
PROFILE_FILE := $(wildcard $(if $(filter %.yaml %.yml,$(PROFILE)),$(PROFILE),msunet_core/study/profiles/$(PROFILE).yaml)) \
  $(wildcard msunet_core/study/ablations.yaml)
# Images given as an .npz, or as folders: a class folder's time changes with the images in it.
DATA_FILES := $(if $(filter-out synthetic cifar100,$(DATA)),$(wildcard $(DATA) $(DATA)/* $(DATA)/*/*))
INPUTS := $(CODE) $(PROFILE_FILE) $(DATA_FILES) $(RECORD)

SHIPPED := runs/pretrained/msunet_v3.safetensors
NAMES := 01_data_and_cutmix 02_ternary_training 03_fp16_pruning 04_o3_validation 05_scoring_walkthrough 06_ablations \
  07_packed_network
EXECUTED := $(NAMES:%=$(RUN_FOLDER)/%.ipynb)
INDEX := $(RUN_FOLDER)/site/index.html
EVIDENCE := $(wildcard docs/* docs/_static/* runs/pretrained/* runs/ablations/*.csv runs/record/*.csv CITATION.cff)

$(RUN_FOLDER)/03_fp16_pruning.ipynb: $(RUN_FOLDER)/02_ternary_training.ipynb
# On the real CIFAR-100 these also look at the shipped network.
$(patsubst %,$(RUN_FOLDER)/%.ipynb,04_o3_validation 05_scoring_walkthrough 07_packed_network): \
  $(RUN_FOLDER)/03_fp16_pruning.ipynb $(wildcard $(SHIPPED))

STAGE_02_ternary_training := train
STAGE_03_fp16_pruning := prune
STAGE_06_ablations := ablations

$(EXECUTED): $(RUN_FOLDER)/%.ipynb: notebooks/%.ipynb $(INPUTS)
	@$(PY) -m msunet_core.study.runner run $< $@ $(PARAMETERS) \
	  $(if $(STAGE_$*),--stage $(RUN_FOLDER)/$(STAGE_$*) --inputs $(filter-out $<,$^))

$(INDEX): $(EXECUTED) $(SITE) $(EVIDENCE)
	@$(PY) -m msunet_core.study.report $(RUN_FOLDER)

# The record of the parameters is rewritten when they differ from those of the last run, and only once
# they are known to be good: a misspelt VARIANT must not make a finished run look out of date.
ifneq ($(strip $(shell cat $(RECORD) 2>/dev/null)),$(PARAMETERS))
$(RECORD): FORCE
CHECK = $(PY) -m msunet_core.study.runner check $(PARAMETERS)
endif
$(RECORD):
	@mkdir -p $(@D) && printf '%s\n' $(call quote,$(PARAMETERS)) > $@

# The targets below make these under the lock of the run folder, in a second make. -n and -q change
# nothing, so they take no lock.
DRY := $(if $(findstring n,$(FLAGS))$(findstring q,$(FLAGS)),yes)
LOCKED = $(if $(DRY),,$(PY) -m msunet_core.study.runner lock $(RUN_FOLDER) -- )$(MAKE)
.PHONY: .reproduce .train .prune
.reproduce: $(INDEX)
.train: $(RUN_FOLDER)/02_ternary_training.ipynb
.prune: $(RUN_FOLDER)/03_fp16_pruning.ipynb

##@ targets

.PHONY: reproduce train prune ablations report
reproduce: $(ENVIRONMENT) ## run notebooks 01..07 headless and build the site, as far as anything changed
	@$(CHECK)
	+@$(LOCKED) .$@
train: $(ENVIRONMENT) ## only notebook 02: ternary training
	@$(CHECK)
	+@$(LOCKED) .$@
prune: $(ENVIRONMENT) ## notebook 03, and 02 if needed: pruning in half precision
	@$(CHECK)
	+@$(LOCKED) .$@
ablations: $(ENVIRONMENT) ## every row of ablations.yaml, into runs/ablations [JOBS= or SCHEDULER=tcp://... PROFILE= DATA= SET=]
	@$(PY) -m msunet_core ablations --profile $(call quote,$(PROFILE)) $(if $(JOBS),--jobs $(call quote,$(JOBS))) \
	  $(if $(SCHEDULER),--scheduler $(call quote,$(SCHEDULER))) $(if $(DATA),--data $(call quote,$(DATA))) \
	  $(if $(LIMIT),--limit $(call quote,$(LIMIT))) $(if $(DEVICE),--device $(call quote,$(DEVICE))) $(if $(SET),--set $(SET))
report: $(ENVIRONMENT) ## build the site of RUN again from what is there, running nothing
	@$(PY) -m msunet_core.study.report $(RUN_FOLDER)

.PHONY: score validate pack pretrained
needed = $(if $($1),,$(error give $1=..., for example $2))
score: $(ENVIRONMENT) ## score the shipped network or CHECKPOINT=... [VARIANT= OPT_LEVEL=]
	@$(PY) -m msunet_core score $(FILE) $(OPTIONS)
validate: $(ENVIRONMENT) ## test the shipped network or CHECKPOINT= on DATA=... [VARIANT= OPT_LEVEL= LIMIT= DEVICE=]
	@$(call needed,DATA,DATA=cifar100 or the path of an .npz)\
	$(PY) -m msunet_core validate $(FILE) --data $(call quote,$(DATA)) $(OPTIONS) $(SOME)
pack: $(ENVIRONMENT) ## write CHECKPOINT=... as a packed file OUT=...; DATA=... keeps its top-1 in it
	@$(call needed,CHECKPOINT,make pack CHECKPOINT=runs/smoke/prune OUT=smoke.safetensors)\
	$(call needed,OUT,OUT=smoke.safetensors)\
	$(PY) -m msunet_core pack $(FILE) $(call quote,$(OUT)) $(if $(VARIANT),--variant $(call quote,$(VARIANT))) \
	  $(if $(DATA),--data $(call quote,$(DATA)) $(SOME))
pretrained: $(ENVIRONMENT) ## ship RUN=...: its pruned network packed, measured on DATA=..., with curves and provenance
	@$(call needed,DATA,DATA=cifar100 or the path of an .npz)$(PY) -m msunet_core.study.runner ship $(RUN_FOLDER) $(dir $(SHIPPED))
	@$(PY) -m msunet_core pack $(RUN_FOLDER)/prune $(SHIPPED) --data $(call quote,$(DATA))
FILE = $(if $(CHECKPOINT),$(call quote,$(CHECKPOINT)))
SOME = $(if $(LIMIT),--limit $(call quote,$(LIMIT))) $(if $(DEVICE),--device $(call quote,$(DEVICE)))
OPTIONS = $(if $(VARIANT),--variant $(call quote,$(VARIANT))) $(if $(OPT_LEVEL),--opt-level $(call quote,$(OPT_LEVEL)))

.PHONY: test test-fast lint lab notebooks
# A fresh folder for runs each time: nothing of an earlier run may be found and reused.
FRESH_RUNS = runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && trap 'exit 130' INT TERM && MSUNET_RUNS="$$runs"
test: lint ## ruff, all tests, and every notebook against its stored outputs
	$(PY) -m pytest
	@$(FRESH_RUNS) $(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout 900 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks
test-fast: lint ## ruff and the quick tests, in under a minute
	$(PY) -m pytest -q -m "not slow"
.PHONY: faults
faults: $(ENVIRONMENT) ## kill, damage and fill on purpose: 30 kills, 1,000 files, crafted pickles, full disks
	@$(PY) tests/faults.py
lint: $(ENVIRONMENT) ## ruff, rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
lab: $(ENVIRONMENT) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks
notebooks: $(ENVIRONMENT) ## execute the committed notebooks in place: smoke profile, default parameters
	@$(FRESH_RUNS) $(PY) -m msunet_core.study.runner refresh notebooks/*.ipynb

.PHONY: bench
bench: $(ENVIRONMENT) ## time the released way and ours side by side [BENCH=--quick]; writes runs/bench/bench.json
	@$(PY) benchmarks/bench.py $(BENCH)

.PHONY: clean help FORCE
clean: ## remove the folder of RUN and the tools' caches; data/ and .venv stay
	rm -rf $(RUN_FOLDER) .pytest_cache .ruff_cache build *.egg-info
	find msunet_core tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r target text; do \
	  printf '  make %-11s %s\n' "$$target" "$$text"; done
