"""Profiles of machines that nobody has measured, from their datasheets and a measured machine.

    python -m neo_plan.datasheet            write the files of `neo_plan/profiles`
    python -m neo_plan.datasheet --check    say which differ from what would be written

Each part of a sweep is bound by one figure of the datasheet, and takes the same share of it as on
the measured machine. Dense layers are bound by two; between them the measured machine does not
take the larger of the two times but a sum of powers of them, and so does this:

    dense(rows) = (reading^p + computing(rows)^p) ^ (1/p)      p from the measured 256 rows

That shares carry over is an assumption; tiles, clocks under load and caches differ. A profile from
here orders machines; it does not promise a figure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from neo_plan.simulator.profile import (
    PROFILES,
    CpuProfile,
    Curve,
    Figure,
    GpuProfile,
    LinkProfile,
    Profile,
    read_profile,
)

REFERENCE = "h100-16c.json"
_NOT = "datasheet, not measured"
_JOINT_ROWS, _READ_ROWS, _COMPUTE_ROWS = 256, 24, 8192
"""Where the measured machine is bound by both, by memory and by arithmetic."""


@dataclass(frozen=True)
class Datasheet:
    """What is published of a card, and of a host that it comes with."""

    name: str
    card: str
    memory_gib: float
    """Usable, of what the card's name says."""
    memory_gbps: float
    tflops: float
    """16 bits, dense."""
    link_gbps: float
    """Each way."""
    host: str
    host_gbps: float
    """Memory of one socket."""


MEASURED = Datasheet(
    "h100", "H100 SXM 80 GB", 79.2, 3350, 989, 63, "Sapphire Rapids, 8 x DDR5-4800", 307
)
"""The datasheet of `REFERENCE`."""

CARDS = (
    Datasheet("t4", "T4 16 GB", 14.6, 320, 65, 15.8, "Cascade Lake, 6 x DDR4-2933", 141),
    Datasheet("l4", "L4 24 GB", 22.0, 300, 121, 31.5, "EPYC Milan, 8 x DDR4-3200", 205),
    Datasheet("a10g", "A10G 24 GB", 22.0, 600, 70, 31.5, "EPYC Rome, 8 x DDR4-3200", 205),
    Datasheet(
        "a100-80", "A100 SXM 80 GB", 79.2, 2039, 312, 31.5, "Cascade Lake, 6 x DDR4-2933", 141
    ),
    Datasheet(
        "h200", "H200 SXM 141 GB", 139.8, 4800, 989, 63, "Sapphire Rapids, 8 x DDR5-4800", 307
    ),
    Datasheet("gh200", "GH200 96 GB", 94.5, 4000, 989, 450, "Grace, LPDDR5X", 500),
)

SOCKET_SHARE = 0.7
"""Of a socket's memory bandwidth that reads from one process reach at most: an assumption; the
measured machine, a part of a socket, reached 0.45 with the threads that it had."""


def derive(sheet: Datasheet, reference: Profile) -> Profile:
    return Profile(
        about=f"{sheet.card}, host {sheet.host}: {_NOT}; shares of its figures as on the measured "
        "machine (neo_plan/datasheet.py)",
        model=reference.model,
        gpu=_gpu(sheet, reference.gpu),
        cpu=_cpu(sheet, reference.cpu),
        link=_link(sheet, reference.link),
        host=reference.host,
    )


def _gpu(sheet: Datasheet, known: GpuProfile) -> GpuProfile:
    memory, compute = MEASURED.memory_gbps / sheet.memory_gbps, MEASURED.tflops / sheet.tflops
    gbps = f"{_NOT}: {sheet.memory_gbps:g} GB/s"
    tflops = f"{_NOT}: {sheet.tflops:g} TFLOP/s"
    # Few rows are launches, which are not quicker with more bandwidth.
    small = {
        rows: round(ms * memory, 3) if rows >= _JOINT_ROWS else ms
        for rows, ms in known.small_ms.points.items()
    }
    return GpuProfile(
        memory_gib=Figure(sheet.memory_gib, f"{_NOT}: {sheet.card}, less what its driver keeps"),
        dense_ms=Curve(_dense(sheet, known.dense_ms), f"{gbps} and {sheet.tflops:g} TFLOP/s"),
        small_ms=Curve(small, gbps),
        head_ms=_scaled(known.head_ms, memory, gbps),
        gaps_ms=Figure(known.gaps_ms.value, f"{_NOT}: as on the measured machine"),
        decode_attention_gbps=Figure(round(known.decode_attention_gbps.value / memory, 1), gbps),
        decode_attention_layer_us=Figure(
            known.decode_attention_layer_us.value, f"{_NOT}: as on the measured machine"
        ),
        prefill_attention_tflops=Figure(
            round(known.prefill_attention_tflops.value / compute, 2), tflops
        ),
        prefill_attention_layer_us=Figure(
            known.prefill_attention_layer_us.value, f"{_NOT}: as on the measured machine"
        ),
    )


def _dense(sheet: Datasheet, known: Curve) -> dict[int, float]:
    read, compute = known.at(_READ_ROWS), known.at(_COMPUTE_ROWS)
    # On the measured machine, then on this one.
    power = _power(read, compute * _JOINT_ROWS / _COMPUTE_ROWS, known.at(_JOINT_ROWS))
    read *= MEASURED.memory_gbps / sheet.memory_gbps
    per_row = compute / _COMPUTE_ROWS * MEASURED.tflops / sheet.tflops
    return {
        rows: round((read**power + (rows * per_row) ** power) ** (1 / power), 3)
        for rows in known.points
    }


def _power(read: float, compute: float, together: float) -> float:
    """p with (read^p + compute^p)^(1/p) = together; by halving, since that falls with p."""
    low, high = 1.0, 32.0
    for _ in range(60):
        middle = (low + high) / 2
        if (read**middle + compute**middle) ** (1 / middle) > together:
            low = middle
        else:
            high = middle
    return low


def _scaled(curve: Curve, factor: float, source: str) -> Curve:
    points = {x: round(value * factor, 3) for x, value in curve.points.items()}
    return Curve(points, source)


def _cpu(sheet: Datasheet, known: CpuProfile) -> CpuProfile:
    a_thread = known.read_gbps.value / known.threads.value
    most = SOCKET_SHARE * sheet.host_gbps
    source = f"{_NOT}: {SOCKET_SHARE:g} of one socket's {sheet.host_gbps:g} GB/s"
    same = f"{_NOT}: as on the measured machine"
    return CpuProfile(
        read_gbps=Figure(round(most, 1), source),
        threads=Figure(round(most / a_thread), f"{_NOT}: each reads as on the measured machine"),
        attention_share=Figure(known.attention_share.value, same),
        attention_share_int8=Figure(known.attention_share_int8.value, same),
    )


def _link(sheet: Datasheet, known: LinkProfile) -> LinkProfile:
    share = known.gbps.value / MEASURED.link_gbps
    same = f"{_NOT}: as on the measured machine"
    return LinkProfile(
        gbps=Figure(round(share * sheet.link_gbps, 1), f"{_NOT}: {sheet.link_gbps:g} GB/s"),
        copy_us=Figure(known.copy_us.value, same),
        doorbell_us=Figure(known.doorbell_us.value, same),
        deferred_layer_us=Figure(known.deferred_layer_us.value, same),
        streamed_layer_us=Figure(known.streamed_layer_us.value, same),
    )


def files() -> dict[str, bytes]:
    """Name -> what the file must hold."""
    reference = read_profile(REFERENCE)
    return {
        f"{card.name}.json": msgspec.json.format(
            msgspec.json.encode(derive(card, reference)), indent=1
        )
        + b"\n"
        for card in CARDS
    }


def main(argv: Sequence[str]) -> int:
    stale = []
    for name, text in files().items():
        path = PROFILES / name
        if not path.is_file() or path.read_bytes() != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_bytes(text)
    print(", ".join(stale) or "all are up to date")
    return int("--check" in argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
