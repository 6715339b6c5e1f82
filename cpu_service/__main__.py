"""`python -m cpu_service --config FILE`: host KV pools and decode attention for the engines of this
machine."""

from __future__ import annotations

import os
import sys

from cpu_service.config import CpuServiceConfig
from neo_common import logging as neo_logging
from neo_common.config import fail, load_or_exit

PROG = "cpu_service"


def main() -> int:
    config = load_or_exit(
        CpuServiceConfig,
        sys.argv[1:],
        prog=PROG,
        description="Keeps host KV pools and runs decode attention over them.",
    )
    if config.isa:
        os.environ["NEO_CPU_ISA"] = config.isa  # the extension reads it when it is first used
    try:
        neo_logging.setup(PROG, config.log_level, config.log_format)
        from cpu_service.server import run

        run(config)
    except ValueError as error:
        fail(PROG, str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
