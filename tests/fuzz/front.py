"""The front end without an engine, for parsers of requests: a small model's tokenizer, a chat
template, and a servicer whose requests nobody runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpu_service.engine.messages import Submit
from gpu_service.frontend.inference import InferenceServicer
from gpu_service.frontend.validate import ServedModel, parse_request
from gpu_service.model.chat import ChatTemplate
from gpu_service.model.structured import GrammarChecker
from gpu_service.model.tokenizer import Tokenizer
from neo_common.errors import ServiceError
from neo_common.grpc.guard import Malformed, _lenient
from neo_common.model_spec import ModelSpec, RopeSpec
from protos.neo.v1 import inference_pb2 as pb
from tests.fuzz.target import Finding, refused

VOCAB = 320
CONTEXT = 512
MODEL = ServedModel("tiny", VOCAB, CONTEXT)
SPEC = ModelSpec(
    name="tiny", family="llama", layers=2, hidden_size=48, intermediate_size=96, query_heads=6,
    kv_heads=2, head_dim=8, vocab_size=VOCAB, norm_eps=1e-6, rope=RopeSpec(10_000.0),
    max_context_tokens=CONTEXT, tied_embeddings=False, qkv_bias=False, qk_norm=False,
    sliding_window=(0, 0), bos_token_id=256, eos_token_ids=(257,),
)  # fmt: skip
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return loop().run_until_complete(coroutine)


@cache
def tokenizer() -> Tokenizer:
    """One token a byte; ids 256 and 257 are <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, (257,), ChatTemplate(_TEMPLATE, {}))


@cache
def checker() -> GrammarChecker:
    return GrammarChecker(tokenizer(), VOCAB)


class NoDispatcher:
    """Knows no request."""

    async def abort(self, request_id: str) -> None:
        return None


@cache
def servicer() -> InferenceServicer:
    made = InferenceServicer(SPEC, tokenizer(), cast(Any, NoDispatcher()), cast(Any, None))
    made.ready(MODEL, "float32")
    return made


def request_of(kind: Any, data: bytes) -> Any:
    """The message, as a handler gets it. Raises ServiceError."""
    message = _lenient(kind.FromString)(data)
    if isinstance(message, Malformed):
        raise message.error()
    return message


def parse(request: pb.GenerateRequest) -> None:
    """What is taken must be what the engine can bear. Raises ServiceError."""
    parsed = wait(parse_request(request, MODEL, tokenizer(), now=1.0, seconds_left=None))
    _check(parsed.submit)
    for text in parsed.stop:
        text.encode()


def _check(submit: Submit) -> None:
    spec = submit.sampling
    room = CONTEXT - len(submit.prompt_token_ids)
    sane = (
        0 < len(submit.prompt_token_ids) < CONTEXT
        and min(submit.prompt_token_ids) >= 0
        and max(submit.prompt_token_ids) < VOCAB
        and 1 <= spec.max_tokens <= room
        and 1 <= spec.n <= 16
        and 0 <= spec.temperature < float("inf")
        and 0 < spec.top_p <= 1
        and 0 <= spec.min_p <= 1
        and 0.0009 < spec.repetition_penalty <= 1000
        and abs(spec.presence_penalty) <= 2
        and abs(spec.frequency_penalty) <= 2
        and all(abs(bias) <= 100 for bias in spec.logit_bias.values())
        and all(0 <= token < VOCAB for token in (*spec.logit_bias, *spec.stop_token_ids))
        and 0 <= spec.seed < 2**64
    )
    if not sane:
        raise Finding(f"taken: {submit}")


def harness(handle: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`handle`, whose ServiceErrors are looked at."""

    def one(data: bytes) -> None:
        try:
            handle(data)
        except ServiceError as error:
            refused(error)

    return one
