"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

GGUF stores vocabulary and merges, but only a name for how text is cut before merging.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gpu_service.model.bounds import shown
from gpu_service.model.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_MAX_CHARACTERS = 4096
"""Of a token. Finding out which two tokens make one takes the square of it."""
_SPACE = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_LLAMA3, _QWEN2, _SMOLLM, _GPT2 = "llama-bpe", "qwen2", "smollm", "gpt-2"
_KINDS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _SMOLLM,
    "gpt-2": _GPT2,
    "default": _GPT2,
}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """ValueError names the metadata that is missing or of an unknown kind."""
    tokens = _strings(file, "tokens")
    model = file.metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer, bos_by_default = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer, bos_by_default = _sentencepiece(file, tokens), True
    else:
        raise ValueError(
            f"{file.path}: tokenizer model {shown(model)} is not supported (gpt2, llama are)"
        )
    _add_special_tokens(tokenizer, file, tokens)
    _add_post_processor(tokenizer, file, tokens, bos_by_default)
    return tokenizer


def special_tokens(file: GgufFile) -> dict[str, str]:
    """Names that chat templates use -> the tokens."""
    tokens = _strings(file, "tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: _token(file, tokens, i) for name, i in ids.items() if i is not None}


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{file.path}: pre-tokenizer {shown(name)} is not supported ({', '.join(_KINDS)} are)"
        )
    merges = []
    for merge in _strings(file, "merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        _checked(file, vocab=vocabulary, merges=merges, ignore_merges=kind == _LLAMA3)
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    if kind == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind == _LLAMA3


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == _SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = Regex(_LLAMA3_SPLIT if kind == _LLAMA3 else _QWEN2_SPLIT)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or not all(isinstance(s, int | float) for s in scores):
        raise ValueError(f"{file.path}: tokenizer.ggml.scores are not numbers")
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.scores does not score each token")
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        _checked(
            file,
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, scores),
            unk_token=_token(file, tokens, unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two: SentencePiece joins the pair whose result scores best."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, -len(left), ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _checked(file: GgufFile, **settings: Any) -> models.BPE:
    try:
        return models.BPE(**settings)
    # tokenizers raises plain Exception, for instance for a merge of tokens that do not exist.
    except Exception as error:
        raise ValueError(f"{file.path}: its tokenizer is damaged: {error}") from error


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Control tokens and user-defined ones are found in text as wholes; only control is special."""
    kinds = file.metadata.get("tokenizer.ggml.token_type") or []
    if not isinstance(kinds, list):
        raise ValueError(f"{file.path}: tokenizer.ggml.token_type is {shown(kinds)}, no list")
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_post_processor(
    tokenizer: Tokenizer, file: GgufFile, tokens: list[str], bos_by_default: bool
) -> None:
    def added(name: str, default: bool) -> tuple[str, int] | None:
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = file.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return (
            (_token(file, tokens, token_id), token_id) if wanted and token_id is not None else None
        )

    bos, eos = added("bos", bos_by_default), added("eos", False)
    ends = [end for end in (bos, eos) if end]
    if ends:
        before, after = (f"{bos[0]}:0 " if bos else ""), (f" {eos[0]}:0" if eos else "")
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{before}$A:0{after}", special_tokens=ends
            )
        # tokenizers raises plain Exception, for instance for a token with a blank in it.
        except Exception as error:
            raise ValueError(
                f"{file.path}: its tokens cannot stand around a text: {error}"
            ) from error


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ValueError(f"{file.path} has no tokenizer: tokenizer.ggml.{key} is missing")
    longest = max(map(len, value))
    if longest > _MAX_CHARACTERS:
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} holds a text of {longest} characters")
    return value


def _token(file: GgufFile, tokens: list[str], token_id: Any) -> str:
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{file.path}: a special token has the id {shown(token_id)}")
    return tokens[token_id]
