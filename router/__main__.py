"""`python -m router --config FILE`: see `--help`."""

from __future__ import annotations

import sys

import uvloop

from neo_common import logging
from neo_common.config import fail, load_or_exit
from router.app import serve
from router.config import RouterConfig


def main() -> None:
    config = load_or_exit(
        RouterConfig,
        sys.argv[1:],
        prog="python -m router",
        description="Relays neo.v1.InferenceService to the least loaded gpu_service.",
    )
    try:
        logging.setup("router", config.log_level, config.log_format)
        uvloop.run(serve(config))
    except ValueError as error:
        fail("router", str(error))


if __name__ == "__main__":
    main()
