"""Words of memory that a kernel shares with the host, or with what else works on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from kernels.gpu.tensors import INTERPRET

INTERPRETED: tl.constexpr = tl.constexpr(INTERPRET)


@triton.jit
def store_release(address, value):
    """A system-scope release: all that this stream has stored before is there with it."""
    if INTERPRETED:
        tl.store(address.to(tl.pointer_type(tl.int32)), value)
    else:
        tl.inline_asm_elementwise(
            "st.release.sys.global.u32 [$1], $2;\n mov.u32 $0, $2;", "=r,l,r",
            [address, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_acquire(address):
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int32)), volatile=True)
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [address],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def nanoseconds():
    """The device's clock."""
    if INTERPRETED:
        return tl.full([], 0, tl.int64)
    return globaltimer()


@triton.jit
def trap():
    """End the context: what should have been cannot be any more."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "trap;\n mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
