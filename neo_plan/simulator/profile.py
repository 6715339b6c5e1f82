"""What a machine takes for the parts of a sweep: a file of figures, each with its source."""

from __future__ import annotations

import bisect
import os
from pathlib import Path

import msgspec

PROFILES = Path(__file__).parents[1] / "profiles"


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number and where it was measured."""

    value: float
    source: str


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured table: linear between its points, level before the first, and with the last two
    points' slope behind the last."""

    points: dict[int, float]
    """Ascending."""
    source: str

    def __post_init__(self) -> None:
        if len(self.points) < 2 or list(self.points) != sorted(self.points):
            raise ValueError("a curve needs two points at least, in ascending order")

    def at(self, x: float) -> float:
        known = list(self.points)
        if x <= known[0]:
            return self.points[known[0]]
        right = min(bisect.bisect_left(known, x), len(known) - 1)
        a, b = known[right - 1], known[right]
        low, high = self.points[a], self.points[b]
        return low + (high - low) * (x - a) / (b - a)


class GpuProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU that runs `Profile.model` in 16 bits. Other models' times are these, in proportion to
    weights, bytes or operations."""

    memory_gib: Figure
    """What the driver reports as a whole."""
    dense_ms: Curve
    """Matrix products of all layers, by rows."""
    small_ms: Curve
    """Norms, rope, KV store and activation of all layers, by rows."""
    head_ms: Curve
    """Output head and draw, by sequences."""
    gaps_ms: Figure
    """Between the kernels of a captured sweep."""
    decode_attention_gbps: Figure
    """KV bytes read a second."""
    decode_attention_layer_us: Figure
    """What a layer's decode attention takes beside that."""
    prefill_attention_tflops: Figure
    """Of causal attention, masked products not counted."""
    prefill_attention_layer_us: Figure
    """What a layer's prefill attention takes beside that."""


class CpuProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cpu_service's attention."""

    read_gbps: Figure
    """Memory reads of all its threads together."""
    threads: Figure
    """How many those were."""
    attention_share: Figure
    """Part of it that decode attention reaches on 16-bit KV."""
    attention_share_int8: Figure


class LinkProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between GPU and host memory."""

    gbps: Figure
    """Each way, large copies."""
    copy_us: Figure
    """A copy's least time."""
    doorbell_us: Figure
    """GPU to cpu_service and back, with nothing to do."""
    deferred_layer_us: Figure
    """What a layer's exchange adds to a captured sweep while nobody waits for it."""
    streamed_layer_us: Figure
    """What reading a layer's KV over the link adds to a captured sweep beside that."""


class HostProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's own Python."""

    iteration_ms: Curve
    """To decide, pack and account one iteration, by its sequences. Overlaps with the device."""
    launched_singly_layer_us: Figure
    """Launching one layer of a sweep that is not captured."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine."""

    about: str
    model: str
    """Of `neo_plan/models`; what `gpu` was measured with."""
    gpu: GpuProfile
    cpu: CpuProfile
    link: LinkProfile
    host: HostProfile


def read_profile(name: str) -> Profile:
    """A path, or a file's name in `neo_plan/profiles`. ValueError says what is wrong with it."""
    path = Path(name)
    if not os.path.exists(path):  # which, unlike Path's, says no to a name that is too long
        path = PROFILES / name
    if not os.path.isfile(path):
        raise ValueError(f"profile {name!r} is neither a file nor one in {PROFILES.name}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except msgspec.MsgspecError as error:
        raise ValueError(f"profile {path.name}: {error}") from error
