"""Makes the calls of a question and writes their answer, whole or piece by piece.

prompt 0 ══GenerateStream══> pieces ─┐
prompt 1 ══GenerateStream══> pieces ─┴─ one chunk a piece ──> events, in the order they come
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from neo_http.answers import (
    FINISH,
    counts_json,
    prompt_logprobs_json,
    stop_reason,
    total,
    usage_json,
)
from neo_http.ask import Asker, together
from neo_http.question import Asked, Piece, Question, Texts
from neo_http.vocabulary import Vocabulary, token_ids_of
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

Send = Callable[[Sequence[bytes]], Awaitable[None]]
"""Takes the JSON of some chunks; awaited, so that a slow reader slows down the call."""


class Answerer:
    """Of one question."""

    def __init__(self, question: Question, ask: Asker, vocabulary: Vocabulary) -> None:
        self.question = question
        self.ask = ask
        self._vocabulary = vocabulary
        self._created = int(time.time())
        self._model = question.model

    async def whole(self) -> dict[str, Any]:
        """Raises ServiceError or CallFailed."""
        question = self.question
        await together(self._prepare(asked) for asked in question.asked)
        answers = await together(
            self.ask("Generate", asked.request, pb.GenerateResponse) for asked in question.asked
        )
        self._model = answers[0].model or self._model
        choices = []
        said = self.head(question.shape.whole)
        for number, (asked, answer) in enumerate(zip(question.asked, answers, strict=True)):
            entries = [entry for choice in answer.choices for entry in choice.logprobs]
            texts = await self.texts(asked, [*entries, *answer.prompt_logprobs])
            about = self.of_prompt(asked, answer.prompt_logprobs, texts)
            for choice in answer.choices:
                piece = self.piece(number, asked, choice, answer.prompt_logprobs, first=True)
                choices.append(question.shape.choice(piece, texts, question))
                if question.shape.prompt_in_choices:
                    choices[-1] |= about
            if not question.shape.prompt_in_choices:
                said |= about
        said["choices"] = choices
        usage = total([answer.usage for answer in answers])
        said["usage"] = usage_json(usage, hide_output=question.hide_output)
        return said

    async def stream(self, send: Send) -> None:
        """Raises ServiceError or CallFailed, possibly after some chunks."""
        question = self.question
        if not self._model:
            answer = await self.ask("GetModel", pb.GetModelRequest(), pb.GetModelResponse)
            self._model = answer.model.name
        await together(self._prepare(asked) for asked in question.asked)
        usages = await together(
            _Stream(self, number, asked, send).run() for number, asked in enumerate(question.asked)
        )
        if question.include_usage:
            last = self.head(question.shape.chunk)
            usage = usage_json(total(usages), hide_output=question.hide_output)
            await send([msgspec.json.encode(last | {"choices": [], "usage": usage})])

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.question.identity,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    async def _prepare(self, asked: Asked) -> None:
        """Find out what the answer needs of the prompt."""
        question, request = self.question, asked.request
        kind = request.WhichOneof("prompt")
        if question.needs_prompt_ids and kind != "token_ids":
            tokenize = pb.TokenizeRequest(model=request.model)
            tokenize.skip_special_tokens = request.skip_special_tokens_in_prompt
            if kind == "text":
                tokenize.text = request.text
            else:
                tokenize.chat.CopyFrom(request.chat)
            answer = await self.ask("Tokenize", tokenize, pb.TokenizeResponse)
            asked.prompt_ids = list(answer.token_ids)
            request.token_ids.ids.extend(asked.prompt_ids)  # the same ones, to be sure
        if question.echo and kind == "token_ids":
            detokenize = pb.DetokenizeRequest(
                model=request.model,
                token_ids=asked.prompt_ids,
                include_special_tokens=request.include_special_tokens,
            )
            asked.prompt_text = (
                await self.ask("Detokenize", detokenize, pb.DetokenizeResponse)
            ).text

    async def texts(self, asked: Asked, entries: Sequence[types.TokenLogprobs]) -> Texts:
        question = self.question
        if not entries or not (question.logprobs or question.prompt_logprobs):
            return {}
        tokens = token_ids_of(entries)
        if question.echo and asked.prompt_ids:
            tokens.add(asked.prompt_ids[0])
        return await self._vocabulary.texts(question.model, tokens, self.ask)

    def of_prompt(
        self, asked: Asked, logprobs: Sequence[types.TokenLogprobs], texts: Texts
    ) -> dict[str, Any]:
        """What vLLM's clients may ask about the prompt."""
        question = self.question
        about: dict[str, Any] = {}
        if question.return_token_ids:
            about["prompt_token_ids"] = list(asked.prompt_ids)
        if question.prompt_logprobs:
            about["prompt_logprobs"] = prompt_logprobs_json(logprobs, texts, question)
        return about

    def piece(
        self,
        number: int,
        asked: Asked,
        choice: pb.Choice,
        prompt_logprobs: Sequence[types.TokenLogprobs],
        *,
        first: bool,
    ) -> Piece:
        question = self.question
        hide, echo = question.hide_output, question.echo and first
        entries: list[types.TokenLogprobs] = []
        if question.logprobs:
            if echo and asked.prompt_ids:
                entries = [types.TokenLogprobs(token_id=asked.prompt_ids[0]), *prompt_logprobs]
            if not hide:
                entries.extend(choice.logprobs)
        finish = FINISH.get(choice.finish_reason, "stop")  # a reason newer than this
        return Piece(
            index=number * question.n + choice.index,
            text=(asked.prompt_text if echo else "") + ("" if hide else choice.text),
            entries=entries,
            token_ids=() if hide else choice.token_ids,
            finish="length" if hide and finish else finish,
            stop_reason=None if hide else stop_reason(choice),
        )


class _Stream:
    """One prompt's part of a streamed answer."""

    def __init__(self, answerer: Answerer, number: int, asked: Asked, send: Send) -> None:
        self._answerer = answerer
        self._number = number
        self._asked = asked
        self._send = send
        self._usage = types.Usage()
        self._tokens: dict[int, int] = {}
        """Choice -> tokens so far; it has begun when it is in here."""
        self._prompt_logprobs: list[types.TokenLogprobs] = []

    async def run(self) -> types.Usage:
        ask = self._answerer.ask
        request = self._asked.request.SerializeToString()
        await ask.inference("GenerateStream", request, ask.call, self._take)
        return self._usage

    async def _take(self, data: bytes) -> None:
        message = pb.GenerateStreamResponse.FromString(data)
        if message.HasField("usage"):
            self._usage = message.usage
        self._prompt_logprobs.extend(message.prompt_logprobs)
        chunks = [
            msgspec.json.encode(chunk)
            for delta in message.deltas
            if (chunk := await self._chunk(delta)) is not None
        ]
        if chunks:
            await self._send(chunks)

    async def _chunk(self, delta: pb.Choice) -> dict[str, Any] | None:
        answerer = self._answerer
        question = answerer.question
        first = delta.index not in self._tokens
        self._tokens[delta.index] = self._tokens.get(delta.index, 0) + len(delta.token_ids)
        piece = answerer.piece(self._number, self._asked, delta, self._prompt_logprobs, first=first)
        if not (first or piece.text or piece.finish or piece.entries or question.return_token_ids):
            return None  # its text is held back until a character is complete
        texts = await answerer.texts(self._asked, piece.entries)
        choice = question.shape.delta(piece, texts, question, first)
        said = answerer.head(question.shape.chunk)
        if first:
            about = answerer.of_prompt(self._asked, (), texts)
            (choice if question.shape.prompt_in_choices else said).update(about)
        said["choices"] = [choice]
        if question.continuous_usage:
            so_far = 0 if question.hide_output else self._tokens[delta.index]
            said["usage"] = counts_json(len(self._asked.prompt_ids), so_far)
        elif question.include_usage:
            said["usage"] = None
        return said
