"""Names of blocks' contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from gpu_service.kv.keys import SECRET_BYTES, BlockKeys, Key, root_key

tokens = st.lists(st.integers(0, 3), max_size=24)


SECRET = bytes(range(SECRET_BYTES))


def keys_of(
    sequence: Sequence[int], size: int, salt: str = "", secret: bytes = SECRET
) -> list[Key]:
    keys = BlockKeys(root_key(secret, salt), size)
    return keys.of(slicer(sequence), len(sequence) // size)


def slicer(sequence: Sequence[int]) -> Callable[[int, int], Sequence[int]]:
    return lambda start, end: sequence[start:end]


@given(tokens, tokens, st.sampled_from([1, 2, 4]))
def test_equal_names_mean_equal_beginnings(one: list[int], other: list[int], size: int) -> None:
    for place, (a, b) in enumerate(zip(keys_of(one, size), keys_of(other, size), strict=False), 1):
        assert (a == b) == (one[: place * size] == other[: place * size])


@given(tokens, st.sampled_from([1, 2, 4]))
def test_they_grow_with_the_sequence(sequence: list[int], size: int) -> None:
    growing = BlockKeys(root_key(SECRET, ""), size)
    for length in range(len(sequence) + 1):
        known = sequence[:length]
        assert growing.of(slicer(known), length // size) == keys_of(known, size)


@given(tokens, tokens, tokens)
def test_copies_grow_apart(both: list[int], one: list[int], other: list[int]) -> None:
    first = BlockKeys(root_key(SECRET, ""), 2)
    first.of(slicer(both), len(both) // 2)
    second = first.copy()
    for keys, sequence in ((first, both + one), (second, both + other)):
        assert keys.of(slicer(sequence), len(sequence) // 2) == keys_of(sequence, 2)


def test_each_token_is_asked_for_once() -> None:
    asked: list[int] = []

    def ids(start: int, end: int) -> Sequence[int]:
        asked.extend(range(start, end))
        return range(start, end)

    keys = BlockKeys(root_key(SECRET, ""), 4)
    for blocks in (2, 1, 2, 5):
        assert len(keys.of(ids, blocks)) == blocks
    assert asked == list(range(20))


def test_salts_share_nothing() -> None:
    sequence = list(range(8))
    everywhere = [keys_of(sequence, 4, salt) for salt in ("", "a", "a\0", "\0a", "b")]
    assert len({key for keys in everywhere for key in keys}) == 10


def test_another_engine_has_other_names() -> None:
    """Nobody can prepare a prompt whose names are known beforehand."""
    assert not set(keys_of(range(8), 4)) & set(keys_of(range(8), 4, secret=bytes(SECRET_BYTES)))


def test_a_salt_cannot_stand_for_a_beginning() -> None:
    """As it could if salts and blocks were hashed alike."""
    (beginning,) = keys_of([1, 2], 2)
    forged = (beginning + bytes([3, 0, 0, 0, 4, 0, 0, 0])).decode("latin-1")
    assert root_key(SECRET, forged) != keys_of([1, 2, 3, 4], 2)[1]


def test_token_ids_do_not_run_into_each_other() -> None:
    assert keys_of([1, 256], 2) != keys_of([257, 0], 2)
    assert keys_of([2**32 - 1, 0], 2) != keys_of([0, 2**32 - 1], 2)
