# The train image: quantizes, trains, evaluates, merges. Torch for the CPU or for CUDA, by its lock.
#
#   make images                         builds it with podman or docker, from a wheelhouse, without a network
#   make images TORCH=cuda              the CUDA build (not built where there is no GPU)
#
# The wheelhouse is `build/wheels/train-${TORCH}`, which `make wheels` downloads by the hashes of train-${TORCH}.lock.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE} AS install
ARG TORCH=cpu
COPY images/train-${TORCH}.lock /lock
COPY build/wheels/train-${TORCH} /wheels
RUN python3.11 -m venv --without-pip /opt/venv \
 && python3.11 -m venv /tmp/pip \
 && /tmp/pip/bin/pip --python /opt/venv/bin/python install --no-index --find-links /wheels --require-hashes --no-compile -r /lock

FROM ${BASE}
COPY --from=install /opt/venv /opt/venv
COPY constraints.txt pyproject.toml /app/
COPY src /app/src
COPY components /app/components
COPY images/entrypoint /app/entrypoint
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app/src:/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 HOME=/tmp
# Last, for they change with every commit; before a RUN, for Buildah does not see a changed argument in LABEL or ENV and
# would take both from its cache, with the revision of an older build.
ARG REVISION=unknown
ARG VERSION=0
# Where a volume goes: whoever the container runs as may write there, and a new volume takes these permissions.
RUN install -d -m 1777 /workspace
WORKDIR /app
USER 10001:10001
LABEL org.opencontainers.image.title="qlora-retrain train" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"
ENV QLORA_RETRAIN_IMAGE=train:${REVISION}
ENTRYPOINT ["/app/entrypoint"]
CMD ["python", "-m", "qlora_retrain.cli", "--help"]
