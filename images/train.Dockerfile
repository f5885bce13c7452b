# The train image: quantizes, trains, evaluates, merges. The lock decides whether its torch is for the CPU or for CUDA.
#
#   make images                         builds it with podman or docker, from a wheelhouse, without a network
#   make images TORCH=cuda              the CUDA build (not built where there is no GPU)
#
# The wheelhouse is `build/wheels/train-${TORCH}`; `make wheels` downloads it and checks it by the hashes in
# train-${TORCH}.lock.
# By digest, or built on this machine; `make images` says which.
ARG BASE
FROM ${BASE} AS install
ARG TORCH=cpu
# --compile adds bytecode, since a read-only root keeps none: every step starts seconds sooner.
COPY images/train-${TORCH}.lock /lock
COPY build/wheels/train-${TORCH} /wheels
RUN python3.11 -m venv --without-pip /opt/venv \
 && python3.11 -m venv /tmp/pip \
 && /tmp/pip/bin/pip --python /opt/venv/bin/python install --no-index --find-links /wheels --require-hashes --compile -r /lock

FROM ${BASE}
COPY --from=install /opt/venv /opt/venv
COPY constraints.txt pyproject.toml /app/
COPY src /app/src
COPY components /app/components
COPY images/entrypoint /app/entrypoint
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app/src:/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 HOME=/tmp
# At the end, because they change with every commit and would invalidate the layers above. Before a RUN, because Buildah
# does not notice a changed argument in LABEL or ENV: it would reuse both from its cache, with an older revision.
ARG REVISION=unknown
ARG VERSION=0
# A volume is mounted here. Every user may write to it, because a new volume takes this folder's permissions.
RUN install -d -m 1777 /workspace
WORKDIR /app
USER 10001:10001
LABEL org.opencontainers.image.title="qlora-retrain train" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"
ENV QLORA_RETRAIN_IMAGE=train:${REVISION}
ENTRYPOINT ["/app/entrypoint"]
CMD ["python", "-m", "qlora_retrain.cli", "--help"]
