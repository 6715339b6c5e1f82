"""Bytes of single tokens, of both kinds of vocabulary."""

from __future__ import annotations

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gpu_service.model.token_bytes import TokenBytes, _byte_alphabet
from gpu_service.model.tokenizer import load_tokenizer


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = {character: i for i, character in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


BYTE_LEVEL = byte_level()


def test_alphabet_is_the_librarys() -> None:
    assert set(_byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


@given(st.text(max_size=30))
def test_a_texts_tokens_are_its_bytes(text: str) -> None:
    pieces = TokenBytes(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode(text).ids
    assert b"".join(pieces.of(i) for i in ids) == text.encode()


def test_special_and_unknown() -> None:
    pieces = TokenBytes(BYTE_LEVEL)
    assert pieces.of(256) == b"<end>"
    assert pieces.of(100_000) == b""


def test_sentencepiece() -> None:
    backend = sentencepiece()
    pieces = TokenBytes(backend)
    assert pieces.of(backend.token_to_id("<0xE6>")) == b"\xe6"
    assert pieces.of(backend.token_to_id("\u2581the")) == b" the"
    assert pieces.of(backend.token_to_id("é")) == "é".encode()


def test_a_real_vocabulary() -> None:
    tokenizer = load_tokenizer("smollm2")
    text = "Grüße, 日本語 🙂!<|im_end|>\n\tx"
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    assert b"".join(pieces) == text.encode()
    assert b"<|im_end|>" in pieces
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
