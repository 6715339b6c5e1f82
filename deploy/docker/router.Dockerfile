# syntax=docker/dockerfile:1
# The router: no torch, no compiler.
#
#   docker build -f deploy/docker/router.Dockerfile -t neo-router .
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
RUN python -m venv /opt/neo && /opt/neo/bin/pip install --no-cache-dir --require-hashes -r deploy/docker/locks/core.txt
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes -r deploy/docker/locks/build.txt
COPY . .
# All instruction sets are built, and chosen at run time: one image for every host of its architecture. Nothing in the
# image installs anything.
RUN PATH=/opt/build/bin:$PATH pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/neo/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/neo/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE}
# No compiler, no pip of ours; runs as nobody in particular, with a read-only root (/tmp is for scratch).
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin neo
COPY --from=build /opt/neo /opt/neo
ENV PATH=/opt/neo/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
USER 10001:10001
WORKDIR /
EXPOSE 7000 7020 8000 9100
ENTRYPOINT ["python", "-m", "router"]
