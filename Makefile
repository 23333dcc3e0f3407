# The study by one command each. `make help` lists them and the variables.
#
# Nothing that a user gives is expanded here or pasted into a command: each variable goes into the environment
# as STUDY_<name>, as it was typed, and msunet_core/study/make.py reads it there. What depends on what stands
# there too, since names of data and folders must not become make's syntax.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

##! variables, as in `make reproduce PROFILE=quick DEVICE=cuda`

# Set here, so that only the command line gives them: DATA or SEED in somebody's environment is not meant for us.
PROFILE := # smoke, evidence, cpu2h, cpu, quick, paper or a .yaml file (default smoke)
RUN := # name of the folder below runs/ (default: the profile's name)
DATA := # synthetic, cifar100, an .npz or a folder (default: the profile's)
DEVICE := # auto, cpu, cuda, ... (default: the profile's)
SEED := # whole number (default: the profile's)
LIMIT := # keep so many images of each class and split
VARIANT := # v1, v2 or v3
SET := # any other value of the profile, as "train.epochs=3 prune.lr=1e-3"
CHECKPOINT := # for score, validate, pack: a file, or the folder of a stage
OPT_LEVEL := # for score, validate: O0, O1, O2 or O3
OUT := # for pack: the file to write; for ablations, pretrained: the folder
JOBS := # for ablations: processes at once (default: as many as cores)
SCHEDULER := # for ablations: a running Dask cluster, tcp://...
PORT := # for lab: where it listens (default: the first free one from 8888 on)
HOST := # for lab: the address it listens at; 0.0.0.0 in a container (default: this machine alone)
BENCH := # for bench: its options, as --quick
SECONDS := # for fuzz: so many for each reader (default 600)
NAMES := PROFILE RUN DATA DEVICE SEED LIMIT VARIANT SET CHECKPOINT OPT_LEVEL OUT JOBS SCHEDULER PORT HOST BENCH SECONDS
OTHERS := PYTHON MSUNET_RUNS

unexport $(NAMES) PYTHON
override export MSUNET_RUNS := $(value MSUNET_RUNS)
$(foreach name,$(NAMES),$(eval export STUDY_$(name) := $$(value $(name))))
export STUDY_GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
export STUDY_KNOWN := $(NAMES) $(OTHERS)
export STUDY_GOALS := $(MAKECMDGOALS)
export PYTHONPATH := $(CURDIR)$(if $(value PYTHONPATH),:$(value PYTHONPATH))

##@ environment: PYTHON=..., else the active one, else .venv made from the first Python that will do

# .venv stays ours, and follows requirements.txt, where somebody activated it.
OTHER_ENV := $(filter-out $(CURDIR)/.venv,$(value VIRTUAL_ENV))
OWN := $(if $(value PYTHON)$(OTHER_ENV)$(if $(value VIRTUAL_ENV),,$(value CONDA_PREFIX)),,yes)
export STUDY_PYTHON := $(if $(OWN),.venv/bin/python,$(if \
  $(value PYTHON),$(value PYTHON),$(if $(value VIRTUAL_ENV),$(value VIRTUAL_ENV),$(value CONDA_PREFIX))/bin/python))
PY := "$$STUDY_PYTHON"
ENVIRONMENT := .known $(if $(OWN),.venv/.complete,.given)

.PHONY: .known .given .python
UNKNOWN := $(filter-out $(STUDY_KNOWN),$(STUDY_GIVEN))
# What targets take that do not go through study/make.py, which looks after its own.
PLAIN := help lint test test-fast faults notebooks lab bench fuzz clean
TAKES_lab := PORT HOST
TAKES_bench := BENCH
TAKES_fuzz := SECONDS
TAKES_clean := PROFILE RUN
IGNORED := $(if $(filter-out $(PLAIN),$(MAKECMDGOALS)),,$(filter-out \
  $(OTHERS) $(foreach goal,$(MAKECMDGOALS),$(TAKES_$(goal))),$(STUDY_GIVEN)))
.known:
ifneq ($(UNKNOWN),)
	@python3 -c 'import os, runpy; known = os.environ["STUDY_KNOWN"].split(); \
	  name = [name for name in os.environ["STUDY_GIVEN"].split() if name not in known][0]; \
	  print(f"no variable {name!r};", runpy.run_path("msunet_core/errors.py")["closest"](name, known))' >&2; exit 1
else ifneq ($(IGNORED),)
	@echo 'make $(or $(MAKECMDGOALS),help) takes no $(firstword $(IGNORED)); leave it out' >&2; exit 1
endif
.given:
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 15) \
	  and u.find_spec("torch") and u.find_spec("papermill")))' || { echo $(PY) 'is not Python 3.11 to 3.14 with the' \
	  'packages: -m pip install -r requirements.txt there, or unset PYTHON, VIRTUAL_ENV and CONDA_PREFIX' >&2; exit 1; }
.python: $(ENVIRONMENT)
	@echo $(PY)

# Shims exist that are found but do not run (pyenv), and Pythons that cannot make environments (Debian).
SUITABLE = -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1

# .making says that what stands there is unfinished, so a killed `make` starts it anew; an environment that is
# whole, or was made by hand, is completed and never removed. The lock is for a second make at the same time.
.venv/.complete: requirements.txt pyproject.toml
	@set -e; \
	exec 9<Makefile; ! command -v flock >/dev/null || flock -n 9 || { echo 'another make is making .venv; wait for it to end' >&2; exit 1; }; \
	if [ -e .venv/.making ] || [ ! -e .venv ]; then \
	  for python in python3.11 python3.13 python3.14 python3.12 python3 none; do if $$python $(SUITABLE); then break; fi; done; \
	  if [ $$python = none ]; then \
	    echo 'no Python 3.11 to 3.14 with venv found; install one (Debian: python3-venv) or give PYTHON=...' >&2; exit 1; \
	  fi; \
	  echo "making .venv from $$($$python --version)" >&2; \
	  rm -rf .venv; mkdir .venv; touch .venv/.making; $$python -m venv .venv; \
	elif ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! .venv/bin/python $(SUITABLE); then \
	  echo '.venv has no pip, or no Python 3.11 to 3.14: remove it, or give PYTHON=...' >&2; exit 1; \
	fi; \
	.venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt; \
	.venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -e .; \
	rm -f .venv/.making; touch $@

##! targets

.PHONY: reproduce train prune ablations report score validate pack
reproduce: $(ENVIRONMENT) ## run notebooks 01..07 headless and build the site, as far as anything changed
train: $(ENVIRONMENT) ## only notebook 02: ternary training
prune: $(ENVIRONMENT) ## notebook 03, and 02 if needed: pruning in half precision
ablations: $(ENVIRONMENT) ## every row of the grid, into runs/ablations [JOBS= or SCHEDULER=]
reproduce train prune:
	+@if [ ! -e .venv ] && [ $(PY) = .venv/bin/python ]; then echo 'all of it, and .venv before'; else exec $(STUDY); fi
report: $(ENVIRONMENT) ## build the site of RUN again from what is there, running nothing
score: $(ENVIRONMENT) ## score the shipped network or CHECKPOINT=... [VARIANT= OPT_LEVEL=]
validate: $(ENVIRONMENT) ## test the shipped network or CHECKPOINT= on DATA=... [VARIANT= OPT_LEVEL= LIMIT= DEVICE=]
pack: $(ENVIRONMENT) ## write CHECKPOINT=... as a packed file OUT=...; DATA=... keeps its top-1 in it
ablations report score validate pack:
	@$(STUDY)
# With -n and -q the first three say what they would run, so those are started even then.
STUDY = $(PY) -m msunet_core.study.make $@

.PHONY: test test-fast lint lab
# A fresh folder for runs each time: nothing of an earlier run may be found and reused.
FRESH_RUNS = runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && trap 'exit 130' INT TERM && MSUNET_RUNS="$$runs"
test: lint ## ruff, all tests, and every notebook against its stored outputs
	$(PY) -m pytest -n auto --dist worksteal
	@$(FRESH_RUNS) $(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout 900 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks
test-fast: lint ## ruff and the quick tests, a few minutes
	$(PY) -m pytest -q -n auto --dist worksteal -m "not slow"
lint: $(ENVIRONMENT) ## ruff, rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
lab: $(ENVIRONMENT) ## open the notebooks in JupyterLab [PORT= HOST=]
	@$(PY) -m msunet_core.study.lab

.PHONY: clean help
clean: .known ## remove the folder of RUN and the tools' caches; data/ and .venv stay
	@profile=$${STUDY_PROFILE:-smoke}; profile=$${profile##*/}; run=$${STUDY_RUN:-$${profile%.y*ml}}; \
	case $$run in ablations|pretrained|recipes|record) run= ;; esac; \
	if ! [[ $$run =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$$ ]]; then \
	  echo "RUN=$${STUDY_RUN:-$$profile} is no folder of a run; give RUN=another" >&2; exit 1; fi; \
	folder=$${MSUNET_RUNS:-runs}/$$run; \
	for lock in "$$folder"/.lock "$$folder"/*/.lock; do \
	  if [ -e "$$lock" ] && command -v flock >/dev/null && ! flock -n "$$lock" true; then \
	    echo "$$folder is in use; wait for it to end" >&2; exit 1; fi; \
	done; \
	rm -rf -- "$$folder" .pytest_cache .ruff_cache build *.egg-info
	@find msunet_core tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
help: .known ## this list
	@sed -nE -e 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' -e 's/^([A-Z_]+) := # (.*)/  \1=\t\2/p' \
	  -e 's/^##! (.*)/\1:/p' Makefile | while IFS=$$'\t' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

##! targets for maintainers
.PHONY: faults fuzz bench notebooks pretrained
faults: $(ENVIRONMENT) ## kills, damaged files, hostile names and pages, full disks, all on purpose
	@$(PY) tests/faults.py
fuzz: $(ENVIRONMENT) ## hand changed files to each reader, guided by coverage [SECONDS=]; needs atheris
	@$(PY) tests/fuzz/fuzz.py --seconds "$${STUDY_SECONDS:-600}"
bench: $(ENVIRONMENT) ## time the released way and ours side by side [BENCH=--quick]; writes runs/bench/bench.json
	@set -f; $(PY) benchmarks/bench.py $$STUDY_BENCH
notebooks: $(ENVIRONMENT) ## execute the committed notebooks in place: smoke profile, default parameters
	@$(FRESH_RUNS) $(PY) -m msunet_core.study.runner refresh notebooks/*.ipynb
pretrained: $(ENVIRONMENT) ## ship RUN=...: its pruned network packed, measured on DATA=..., with curves and provenance
	@$(STUDY)
