"""`python -m benchmarks.overload.service`: a gpu_service with the engine core of `core`."""

from __future__ import annotations

import sys

import uvloop

from gpu_service.__main__ import GpuService
from gpu_service.config import GpuServiceConfig
from gpu_service.engine.client import EngineClient
from neo_common.config import load_or_exit
from neo_common.logging import setup

CORE = "benchmarks.overload.core"


def main() -> int:
    name = "benchmarks.overload.service"
    config = load_or_exit(
        GpuServiceConfig, sys.argv[1:], prog=f"python -m {name}", description=name
    )
    setup("gpu_service", config.log_level, config.log_format)

    async def run() -> int:
        return await GpuService(config, EngineClient(config, CORE)).run()

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main())
