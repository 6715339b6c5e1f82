"""`python -m gpu_service.engine`: see `core_process`."""

from __future__ import annotations

import sys

from gpu_service.engine.core_process import main

if __name__ == "__main__":
    sys.exit(main())
