"""StopFinder against a reference that sees the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_service.frontend.stop import StopFinder

ALPHABET = "ab\U0001f600"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text(ALPHABET, max_size=4), max_size=12)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the earliest match, and which it is: the first asked for at one place."""
    matches = [(text.find(stop), order) for order, stop in enumerate(stops) if stop in text]
    if not matches:
        return text, None
    at, order = min(matches)
    return text[:at], stops[order]


def stream(finder: StopFinder, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        out += finder.feed(piece)
        if finder.found is not None:
            return out
    return out + finder.flush()


@given(PIECES, STOPS)
def test_character_by_character_finds_the_first_to_complete(
    pieces: list[str], stops: list[str]
) -> None:
    """Fed single characters, the match that completes first wins: no other could be known yet."""
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s), i) for i, s in enumerate(stops) if s in text]
    finder = StopFinder(stops)
    out = stream(finder, list(text))
    if not ends:
        assert (out, finder.found) == (text, None)
        return
    _, at, _ = min(ends)
    assert finder.found is not None
    assert out == text[:at]


@given(PIECES, STOPS)
def test_pieces_never_leak_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    finder = StopFinder(stops)
    out = stream(finder, pieces)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if not any(stop in text for stop in stops):
        assert out == text
    else:
        assert finder.found is not None
        assert text.startswith(out + finder.found)


@given(st.text(ALPHABET, max_size=20), STOPS)
def test_one_piece_is_the_naive_search(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    out = stream(finder, [text])
    assert (out, finder.found) == naive(text, stops)


def test_holds_back_no_more_than_needed() -> None:
    finder = StopFinder(["STOP"])
    assert finder.feed("abcS") == "abc"
    assert finder.feed("TO") == ""
    assert finder.feed("x") == "STOx"
    assert finder.feed("STOPrest") == ""
    assert finder.found == "STOP"
