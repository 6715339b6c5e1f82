"""The native extension is untyped; `kernels.cpu` and `kernels.cpu.dataplane` are its typed face."""

from typing import Any

def __getattr__(name: str) -> Any: ...
