"""Changes inputs, by their shape: bytes anywhere, fields of a protobuf message, words of a text.

wire   tag | length | payload ...      fields are dropped, doubled, swapped, emptied, and their
                                       numbers replaced, at any depth; lengths stay right
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from tests.fuzz.target import Shape, Target

_NUMBERS = (
    *(0, 1, 2, 3, 15, 16, 17, 63, 64, 100, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 2**64 - 2**31),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (b"", b"\0", b"a", b"\xff", "\u0130\ufb03".encode(), b"\xed\xa0\x80", b" " * 64, b"%s{0}")
_TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\n",
        b"null",
        b"true",
        b"-",
        b"0",
        b"1e999",
    ),
    *(b"-1", b"NaN", b"Infinity", b"9" * 30, b'"\\ud800"', b"[" * 50, b'{"a":' * 20, b"{}", b"[]"),
    *(b"18446744073709551616", b"-9223372036854775809", b"0.0", b'"\\u0000"', b"2147483648"),
)
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DEPTH = 4


def mutated(target: Target, data: bytes, others: Sequence[bytes], dice: random.Random) -> bytes:
    """`data` changed in one place or some, at most `target.max_bytes` long."""
    for _ in range(1 + int(dice.expovariate(0.7))):
        kind: Shape = target.shape if dice.random() < 0.8 else "bytes"
        if kind == "wire":
            data = _wire(data, dice, _DEPTH, target.words + _TEXTS)
        elif kind == "text":
            data = _words(data, target.words + _TOKENS, dice)
        else:
            data = _bytes(data, target.words, others, dice)
        data = data[: target.max_bytes]
    return data


def _bytes(
    data: bytes, words: Sequence[bytes], others: Sequence[bytes], dice: random.Random
) -> bytes:
    at = dice.randint(0, len(data))
    to = min(len(data), at + int(dice.expovariate(0.1)))
    match dice.randint(0, 6):
        case 0:
            return data[:at] + data[to:]
        case 1:
            return data[:at] + data[at:to] * dice.randint(2, 5) + data[to:]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + dice.choice(others)[dice.randint(0, 20) :] if others else data
        case 4:
            number = dice.choice(_NUMBERS)
            form = dice.choice(["<B", "<H", "<I", "<Q"])
            size = struct.calcsize(form)
            new = struct.pack(form, number % (1 << 8 * size))
            return data[:at] + new + data[at + dice.choice((0, size)) :]
        case 5 if words:
            return data[:at] + dice.choice(words) + data[dice.choice((at, to)) :]
        case _:
            if at == len(data):
                return data + dice.randbytes(3)
            return data[:at] + bytes([data[at] ^ 1 << dice.randint(0, 7)]) + data[at + 1 :]


def _words(data: bytes, words: Sequence[bytes], dice: random.Random) -> bytes:
    """Cuts at the places where a text has some other kind of character."""
    places = [0, len(data)]
    places += [
        i for i in range(1, len(data)) if data[i : i + 1].isalnum() != data[i - 1 : i].isalnum()
    ]
    at, to = sorted((dice.choice(places), dice.choice(places)))
    to = min(to, at + 60) if dice.random() < 0.9 else to
    match dice.randint(0, 3):
        case 0:
            return data[:at] + data[to:]
        case 1:
            return data[:at] + data[at:to] * dice.choice((2, 3, 20)) + data[to:]
        case 2:
            return data[:at] + dice.choice(words) + data[at:]
        case _:
            return data[:at] + dice.choice(words) + data[to:]


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def _fields(data: bytes) -> list[tuple[int, int, bytes]] | None:
    """(number, wire type, payload or the number's bytes) of each field; None: it is no message."""
    found, at = [], 0
    while at < len(data):
        tag, at = _read(data, at)
        if tag is None:
            return None
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, end = _read(data, at)
            if value is None:
                return None
        elif kind == _LENGTH:
            length, at = _read(data, at)
            if length is None:
                return None
            end = at + length
        elif kind in (_FIXED64, _FIXED32):
            end = at + (8 if kind == _FIXED64 else 4)
        else:
            return None
        if number == 0 or end > len(data):
            return None
        found.append((number, kind, data[at:end]))
        at = end
    return found


def _read(data: bytes, at: int) -> tuple[int | None, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            return None, at
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return None, at


def _wire(data: bytes, dice: random.Random, depth: int, texts: Sequence[bytes]) -> bytes:
    fields = _fields(data)
    if not fields:
        return _packed(data, dice) if fields is None else data + _new_field(dice)
    place = dice.randrange(len(fields))
    number, kind, payload = fields[place]
    match dice.randint(0, 7):
        case 0:
            del fields[place]
        case 1:
            fields += [fields[place]] * dice.choice((1, 1, 3, 40))
        case 2:
            other = dice.randrange(len(fields))
            fields[place], fields[other] = fields[other], fields[place]
        case 3:
            fields[place] = (max(1, number + dice.choice((-1, 1, 2))), kind, payload)
        case _:
            if kind == _LENGTH and depth and _fields(payload) and dice.random() < 0.9:
                payload = _wire(payload, dice, depth - 1, texts)
            elif kind == _LENGTH:
                payload = dice.choice(texts) if dice.random() < 0.5 else _packed(payload, dice)
            elif kind == _VARINT:
                payload = varint(dice.choice(_NUMBERS))
            else:
                payload = struct.pack("<d" if kind == _FIXED64 else "<f", dice.choice(_FLOATS))
            fields[place] = (number, kind, payload)
    written = b"".join(_field(*field) for field in fields)
    return written + _new_field(dice) if dice.random() < 0.1 else written


def _packed(data: bytes, dice: random.Random) -> bytes:
    """A text, or numbers one after the other."""
    if dice.random() < 0.3:
        return data + varint(dice.choice(_NUMBERS))
    if dice.random() < 0.1:
        return data * dice.randint(2, 8)
    return _bytes(data, _TEXTS, (), dice)


def _field(number: int, kind: int, payload: bytes) -> bytes:
    length = varint(len(payload)) if kind == _LENGTH else b""
    return varint(number << 3 | kind) + length + payload


def _new_field(dice: random.Random) -> bytes:
    number = dice.randint(1, 30)
    match dice.randint(0, 3):
        case 0:
            return _field(number, _VARINT, varint(dice.choice(_NUMBERS)))
        case 1:
            return _field(number, _FIXED32, struct.pack("<f", dice.choice(_FLOATS)))
        case 2:
            return _field(number, _FIXED64, struct.pack("<d", dice.choice(_FLOATS)))
        case _:
            return _field(number, _LENGTH, dice.choice(_TEXTS))
