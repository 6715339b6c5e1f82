"""Streams of text: nothing lost, nothing taken back, no half characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_service.model.detokenize import DetokenizeStream

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> Tokenizer:
    """One token a byte, and one special token."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Words with a leading space, and bytes for everything else."""
    words = ["\u2581the", "\u2581cat", "s", "\u2581", "a", "<unk>"]
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    vocabulary |= {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BYTES, PIECES = byte_level(), sentencepiece()
THE, CAT, S, END = 256, 257, 258, 262


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    stream = DetokenizeStream(tokenizer, prompt)
    return [*(stream.step(i) for i in ids), stream.flush()]


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_text_comes_back_character_by_character(text: str) -> None:
    ids = BYTES.encode(text).ids
    given_out = pieces(BYTES, ids)
    assert "".join(given_out) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in given_out)


@given(st.lists(st.integers(0, 256), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_come_back_as_decoding_them_at_once(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from([THE, CAT, S, 259, 260, END]), max_size=30))
@settings(max_examples=300, deadline=None)
def test_words_keep_their_spaces(ids: list[int]) -> None:
    assert "".join(pieces(PIECES, ids)) == PIECES.decode(ids, skip_special_tokens=True)


def test_characters_wait_for_their_last_byte() -> None:
    ids = BYTES.encode("é🙂x").ids
    assert pieces(BYTES, ids) == ["", "é", "", "", "", "🙂", "x", ""]
    ids = list("🙂".encode())
    assert pieces(PIECES, ids) == ["", "", "", "🙂", ""]


def test_what_follows_a_prompt_keeps_its_leading_space() -> None:
    assert pieces(PIECES, [CAT]) == ["cat", ""]
    assert pieces(PIECES, [CAT], prompt=(THE,)) == [" cat", ""]
    assert pieces(PIECES, [CAT, S], prompt=(THE,) * 50) == [" cat", "s", ""]
    assert pieces(PIECES, [END, CAT], prompt=(THE,)) == ["", " cat", ""]


def test_half_a_character_at_the_end_is_flushed() -> None:
    ids = BYTES.encode("a🙂").ids[:-1]
    assert pieces(BYTES, ids) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_shown_on_request() -> None:
    stream = DetokenizeStream(PIECES, skip_special_tokens=False)
    assert [stream.step(THE), stream.step(END)] == ["the", "<end>"]


def test_endless_broken_bytes_are_given_out() -> None:
    """Work a token stays bounded, and so does the delay."""
    broken = BYTES.encode("🙂").ids[:1] * 1000
    stream = DetokenizeStream(BYTES)
    lengths = []
    for token in broken:
        stream.step(token)
        lengths.append(len(stream._window))
    assert max(lengths) <= 200
    assert "".join(pieces(BYTES, broken)) == "\ufffd" * 1000


@pytest.mark.parametrize("ids", [[], [END], [END, END]])
def test_nothing_to_say(ids: list[int]) -> None:
    assert "".join(pieces(PIECES, ids)) == ""
