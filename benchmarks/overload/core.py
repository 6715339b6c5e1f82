"""An engine core whose iterations take a fixed time: slow, and yet no burden to the machine.

Started by `benchmarks.overload.service` instead of `gpu_service.engine`. Everything is real but
for a sleep after each iteration, of as many milliseconds as PACE_MS in the environment says.
"""

from __future__ import annotations

import os
import sys
import time

from gpu_service.engine import core_process
from gpu_service.engine.core import EngineCore

PACE_MS = "BENCHMARK_SWEEP_MS"


def paced(core: EngineCore) -> None:
    seconds = float(os.environ[PACE_MS]) / 1e3
    core.observe = lambda plan, result, took: time.sleep(seconds)


if __name__ == "__main__":
    sys.exit(core_process.main(prepare=paced))
