"""Which field of a message that does not parse is to blame, where that can be said.

protobuf refuses a whole message for one text that is not UTF-8 and does not tell where that was.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

# What is looked through at most: these bytes are a stranger's, and this runs on the event loop.
_MAX_FIELDS = 10_000
_MAX_DEPTH = 16
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class _Broken(Exception):
    """These bytes are no message at all, or too long a one to look through."""


def bad_text_field(message: Descriptor, data: bytes) -> str | None:
    """The first text field (`sampling.stop`) whose bytes are not UTF-8; None when there is none, or
    when the message is broken in another way before."""
    try:
        return _search(message, data, iter(range(_MAX_FIELDS)), _MAX_DEPTH)
    except _Broken:
        return None


def _search(message: Descriptor, data: bytes, left: Iterator[int], depth: int) -> str | None:
    for number, payload in _texts_and_messages(data, left):
        field = message.fields_by_number.get(number)
        if field is None:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                payload.decode()
            except UnicodeDecodeError:
                return field.name
        elif field.message_type is not None and depth:
            found = _search(field.message_type, payload, left, depth - 1)
            if found is not None:
                return f"{field.name}.{found}"
    return None


def _texts_and_messages(data: bytes, left: Iterator[int]) -> Iterator[tuple[int, bytes]]:
    """(field number, payload) of each field with a length."""
    place = 0
    while place < len(data):
        if next(left, None) is None:
            raise _Broken
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        elif kind == _LENGTH:
            length, place = _varint(data, place)
            if length > len(data) - place:
                raise _Broken
            yield tag >> 3, data[place : place + length]
            place += length
        else:
            raise _Broken


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = 0
    for position, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, place + position + 1
    raise _Broken
