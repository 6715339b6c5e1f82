"""`python -m neo_client.local.launch PARENT MODULE ARGS...`: run MODULE so that it ends with the
process PARENT, which started it.

A supervisor that is killed with SIGKILL cannot stop its children; the kernel can. (A `preexec_fn`
would do the same, but runs Python between fork and exec beside gRPC's threads.)
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(1)
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
