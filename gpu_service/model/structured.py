"""Output that follows a grammar: JSON schemas, regular expressions and the like, by llguidance.

    front end    wish -> grammar text, compiled once to see whether it can be    (GrammarChecker)
    engine core  grammar text -> one Guide per choice: which tokens may come next      (Guides)

The grammar's text is llguidance's own form, https://github.com/guidance-ai/llguidance. Free of
torch.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from gpu_service.model.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 64 << 10
MAX_PROBLEM_CHARACTERS = 300
REMEMBERED = 64
"""Grammars kept compiled, the least recently used one going first."""
COMPILING = 2
"""At once, in the front end."""

Words = npt.NDArray[np.uint32]
Value = TypeVar("Value")


def limits() -> LLParserLimits:
    """What one grammar may take: a state of its lexer is 1-2 kB, and a mask that would take more
    than about 15 ms ends the request."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,  # a million took a second for a regular expression of 24 bytes
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
    )


def lexicon(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """What llguidance knows of a model's tokens; takes 0.3 s for 49,152 of them. ValueError where
    it cannot tell the tokens' bytes, or where the model has fewer tokens than the tokenizer."""
    return LLTokenizer(
        tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids)
    )


def compiled(words: LLTokenizer, grammar: str) -> LLMatcher:
    """At the grammar's beginning, with its first mask computed. ValueError: what is wrong with
    it."""
    matcher = LLMatcher(words, grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        first_lines = matcher.get_error().split("\n<state>")[0].strip()
        raise ValueError(first_lines[:MAX_PROBLEM_CHARACTERS] or "it cannot be followed")
    return matcher


class Recent(Generic[Value]):
    """The last few values by their key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return self._values[key]


class GrammarChecker:
    """For the front end: whether a grammar can be followed with this model. One event loop."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._words: asyncio.Task[LLTokenizer] | None = None
        self._room = asyncio.Semaphore(COMPILING)
        self._known: Recent[asyncio.Task[None]] = Recent(REMEMBERED)

    async def check(self, grammar: str) -> None:
        """Raises ValueError with what is wrong."""
        await asyncio.shield(
            self._known.get(grammar, lambda: asyncio.create_task(self._compile(grammar)))
        )

    async def _compile(self, grammar: str) -> None:
        if self._words is None:
            making = asyncio.to_thread(lexicon, self._tokenizer, self._vocab_size)
            self._words = asyncio.create_task(making)
        words = await asyncio.shield(self._words)
        async with self._room:
            await asyncio.to_thread(compiled, words, grammar)


class Guide:
    """Which tokens may come next in one choice. Sees accepted tokens only, so it needs no way back:
    those of rows that turn out void, and of KV that is computed again, are none."""

    def __init__(self, matcher: Future[LLMatcher]) -> None:
        self._compiled = matcher
        self._matcher: LLMatcher | None = None
        self._consumed = 0
        self.problem = ""
        """Why it can be followed no further."""

    def allowed(self, output_token_ids: Sequence[int]) -> Words | None:
        """Bit i % 32 of word i // 32 says whether token i may follow this output, which has grown
        since the last call. None where there is a `problem`."""
        if self._matcher is None:
            try:
                self._matcher = self._compiled.result().deep_copy()
            except ValueError as error:
                self.problem = str(error)
                return None
        matcher, news = self._matcher, output_token_ids[self._consumed :]
        self._consumed = len(output_token_ids)
        if news:
            matcher.consume_tokens(list(news))
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            self.problem = "the grammar became too complex to follow"
            return None
        return np.frombuffer(mask, np.uint32)


class Guides:
    """For the engine core: compiles beside the engine's thread, so that grammars delay nobody
    else. Threads: `prepare` and `guide` from one, which may not be that of `Guide`s."""

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._words: Future[LLTokenizer] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._known: Recent[Future[LLMatcher]] = Recent(REMEMBERED)

    def prepare(self, grammar: str) -> Future[LLMatcher]:
        """Start to compile, if that has not been done lately."""
        if self._words is None:
            self._words = self._thread.submit(self._lexicon)
        words = self._words
        return self._known.get(
            grammar, lambda: self._thread.submit(lambda: compiled(words.result(), grammar))
        )

    def guide(self, grammar: str) -> Guide:
        return Guide(self.prepare(grammar))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _lexicon(self) -> LLTokenizer:
        return lexicon(self._load_tokenizer(), self._vocab_size)
