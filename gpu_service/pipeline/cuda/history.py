"""Which slot of the device's history a choice with penalties has."""

from __future__ import annotations

from collections.abc import Container


class HistorySlots:
    """Slots of choices, and up to which output token each of them knows its choice's output.

    The sampler itself adds what it draws, so a slot is filled by the host only where it has missed
    a draw: at first, and after other samplers have drawn.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(slots))
        self._held: dict[int, tuple[int, int]] = {}
        """Choice -> its slot, and the position of its last draw."""

    def take(self, key: int, position: int, running: Container[int]) -> tuple[int, bool]:
        """The slot that output token number `position` of a choice is drawn with, and whether it
        has to be filled first.

        running: the choices that may keep their slots, no more of them than slots.
        """
        if key in self._held:
            slot, last = self._held[key]
        else:
            slot, last = self._free_slot(running), -2
        self._held[key] = slot, position
        # The same position twice: a sweep that was void, or whose result was dropped.
        return slot, position - last not in (0, 1)

    def forget(self) -> None:
        """Somebody else draws: fill all slots anew."""
        self._free = list(range(self._slots))
        self._held.clear()

    def _free_slot(self, running: Container[int]) -> int:
        if not self._free:
            ended = [key for key in self._held if key not in running]
            self._free = [self._held.pop(key)[0] for key in ended]
        return self._free.pop()
