"""What machines have and cost, from a file that the operator writes.

note: example, not an offer
currency: USD
machines:
  a10g-8c: {gpus: 1, cores: 8, host_gib: 32, per_hour: 1.2}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from neo_common.documents import from_yaml


class MachinePrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of machine, as it is rented or written off."""

    gpus: int
    cores: int
    """Hardware threads, as clouds count them."""
    host_gib: float
    per_hour: float
    gpu: str = ""
    """Name of a profile of `neo plan`; empty: not for planning."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.cores < 1 or self.host_gib <= 0 or self.per_hour < 0:
            raise ValueError("gpus, cores, host_gib and per_hour must be sizes and a price")


class PriceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    machines: dict[str, MachinePrice]
    currency: str = "USD"
    note: str = ""
    """Where the prices are from; shown beside what follows from them."""


def read_prices(path: str) -> PriceFile:
    """ValueError says what is wrong with the file."""
    try:
        content = from_yaml(Path(path).read_text(encoding="utf-8"))
        return msgspec.convert(content, PriceFile)
    except OSError as error:
        raise ValueError(f"prices: cannot read {path}: {error}") from None
    except ValueError as error:  # msgspec's, too
        raise ValueError(f"prices: {path}: {error}") from None


@dataclass(frozen=True)
class Fleet:
    """The machines behind a measured address; None where nobody has said."""

    name: str = ""
    gpus: float | None = None
    cores: float | None = None
    per_hour: float | None = None
    currency: str = "USD"

    def efficiency(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens for what the fleet took; what is not known is left out."""
        if seconds <= 0:
            return {}
        paid = {
            "tokens_per_gpu_second": self.gpus and self.gpus * seconds,
            "tokens_per_core_second": self.cores and self.cores * seconds,
            "tokens_per_usd": self.per_hour and self.per_hour * seconds / 3600,
        }
        return {name: round(tokens / value, 4) for name, value in paid.items() if value}


def fleet_of(prices: PriceFile, wanted: Mapping[str, int]) -> Fleet:
    """`wanted`: machines by name. ValueError for one that the file does not have."""
    for name in wanted:
        if name not in prices.machines:
            known = ", ".join(sorted(prices.machines)) or "none"
            raise ValueError(f"machine {name!r} is not in the price file, which has {known}")
    rows = [(prices.machines[name], count) for name, count in wanted.items()]
    return Fleet(
        name=", ".join(f"{count} x {name}" for name, count in wanted.items()),
        gpus=sum(row.gpus * count for row, count in rows),
        cores=sum(row.cores * count for row, count in rows),
        per_hour=sum(row.per_hour * count for row, count in rows),
        currency=prices.currency,
    )
