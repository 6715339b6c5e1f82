"""Messages of vllm.grpc.engine from and to those of neo.v1. Pure functions.

The semantics are those of vLLM's own servicer (smg-grpc-servicer 0.14, `vllm/servicer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gpu_service.frontend.validate import invalid
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as neo
from protos.neo.v1 import types_pb2 as types

_FINISH = {
    types.FINISH_REASON_STOP: "stop",
    types.FINISH_REASON_LENGTH: "length",
    types.FINISH_REASON_ABORTED: "abort",
}
_REFUSED = ("kv_transfer_params", "mm_inputs", "media_refs", "extra_mm_inputs")
WHOLE_CONTEXT = -1
"""truncate_prompt_tokens: as many as fit."""


def check_supported(request: vllm.GenerateRequest) -> None:
    """Raises ServiceError for what would change the answer and cannot be honoured."""
    for name in _REFUSED:
        if getattr(request, name):
            raise invalid(name, "is not supported: this engine serves text on one worker")
    if request.kv_transfer_params_json not in ("", "{}"):
        raise invalid("kv_transfer_params_json", "is not supported")
    if request.data_parallel_rank != 0:
        raise invalid("data_parallel_rank", f"is {request.data_parallel_rank}; the only rank is 0")


def truncated(ids: Sequence[int], params: vllm.SamplingParams, longest: int) -> Sequence[int]:
    """The prompt's last `truncate_prompt_tokens` ids. longest: prompt tokens that can be served."""
    if not params.HasField("truncate_prompt_tokens"):
        return ids
    keep = params.truncate_prompt_tokens
    if keep == WHOLE_CONTEXT:
        keep = longest
    if keep < 1:
        raise invalid("sampling_params.truncate_prompt_tokens", f"is {keep}, not -1 or 1 and more")
    return ids[-keep:]


def generate_request(request: vllm.GenerateRequest, ids: Iterable[int]) -> neo.GenerateRequest:
    """What InferenceService is asked. ids: the prompt's. Raises ServiceError."""
    check_supported(request)
    params = request.sampling_params
    return neo.GenerateRequest(
        request_id=request.request_id,
        token_ids=types.TokenIds(ids=ids),
        sampling=sampling_params(params),
        include_special_tokens=not params.skip_special_tokens,
        # Stop strings are found in the text.
        token_ids_only=not params.stop,
    )


def sampling_params(params: vllm.SamplingParams) -> types.SamplingParams:
    """Raises ServiceError for what neo.v1 has no field for."""
    sampling = types.SamplingParams(
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        top_k=params.top_k,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        n=params.n or 1,
    )
    # Where 0 is no value of ours, it means the default.
    for name in ("top_p", "repetition_penalty"):
        if value := getattr(params, name):
            setattr(sampling, name, value)
    for name in ("temperature", "max_tokens"):
        if params.HasField(name):
            setattr(sampling, name, getattr(params, name))
    for name in ("logprobs", "prompt_logprobs", "seed"):
        if params.HasField(name):
            setattr(sampling, name, _not_negative(name, getattr(params, name)))
    for token, bias in params.logit_bias.items():
        sampling.logit_bias[_not_negative("logit_bias", token)] = bias
    if constraint := params.WhichOneof("constraint"):
        sampling.structured.CopyFrom(_structured(params, constraint))
    return sampling


def _structured(params: vllm.SamplingParams, constraint: str) -> types.StructuredOutput:
    if constraint == "structural_tag":
        raise invalid("sampling_params.structural_tag", "is not supported")
    if constraint == "choice":
        choices = types.ChoiceList(texts=params.choice.choices)
        return types.StructuredOutput(choices=choices)
    return types.StructuredOutput(**{constraint: getattr(params, constraint)})


def _not_negative(name: str, value: int) -> int:
    if value < 0:
        raise invalid(f"sampling_params.{name}", f"is {value}; negative values are not supported")
    return value


@dataclass
class Answer:
    """Turns what InferenceService says of one request into VllmEngine's messages.

    prompt_logprobs: how many were asked for of each prompt token, or None.
    """

    prompt_ids: Sequence[int]
    stream: bool
    logprobs: int | None
    prompt_logprobs: int | None
    _whole: dict[int, neo.Choice] = field(default_factory=dict)
    _input: vllm.InputLogProbs | None = None
    _begun: set[int] = field(default_factory=set)
    _tokens: dict[int, int] = field(default_factory=dict)

    def take(self, message: neo.GenerateStreamResponse) -> Iterator[vllm.GenerateResponse]:
        cached = message.usage.prefix_hit_tokens  # comes with the last message
        if message.prompt_logprobs:
            self._input = self._input_logprobs(message.prompt_logprobs)
        for delta in message.deltas:
            self._tokens[delta.index] = self._tokens.get(delta.index, 0) + len(delta.token_ids)
            if self.stream:
                yield vllm.GenerateResponse(chunk=self._chunk(delta))
                if delta.finish_reason:
                    delta.ClearField("token_ids")
                    delta.ClearField("logprobs")
                    yield vllm.GenerateResponse(complete=self._complete(delta, cached))
            else:
                self._whole.setdefault(delta.index, neo.Choice()).MergeFrom(delta)
        if message.HasField("usage") and not self.stream:
            for index in sorted(self._whole):
                yield vllm.GenerateResponse(complete=self._complete(self._whole[index], cached))

    def _chunk(self, delta: neo.Choice) -> vllm.GenerateStreamChunk:
        chunk = vllm.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(delta.token_ids),
            output_logprobs=self._output_logprobs(delta),
            index=delta.index,
        )
        if delta.index not in self._begun and self._input is not None:
            chunk.input_logprobs.CopyFrom(self._input)
        self._begun.add(delta.index)
        return chunk

    def _complete(self, choice: neo.Choice, cached: int) -> vllm.GenerateComplete:
        complete = vllm.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=_FINISH[choice.finish_reason],
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self._tokens[choice.index],
            cached_tokens=cached,
            output_logprobs=self._output_logprobs(choice),
            input_logprobs=self._input,
            index=choice.index,
        )
        stopped_by = choice.WhichOneof("stopped_by")
        if stopped_by == "stop_string":
            complete.matched_stop_str = choice.stop_string
        elif stopped_by == "stop_token_id":
            complete.matched_token_id = choice.stop_token_id
        return complete

    def _output_logprobs(self, choice: neo.Choice) -> vllm.OutputLogProbs | None:
        if not choice.logprobs:
            return None
        return vllm.OutputLogProbs(
            token_logprobs=[entry.logprob for entry in choice.logprobs],
            token_ids=[entry.token_id for entry in choice.logprobs],
            top_logprobs=[_top(entry) for entry in choice.logprobs] if self.logprobs else None,
        )

    def _input_logprobs(self, entries: Sequence[types.TokenLogprobs]) -> vllm.InputLogProbs:
        """The first prompt token has none: its place is kept."""
        values = [vllm.InputTokenLogProb()]
        values += [vllm.InputTokenLogProb(value=entry.logprob) for entry in entries]
        found = vllm.InputLogProbs(token_logprobs=values, token_ids=self.prompt_ids)
        if self.prompt_logprobs:
            found.top_logprobs.append(vllm.TopLogProbs())
            found.top_logprobs.extend(_top(entry) for entry in entries)
        return found


def _top(entry: types.TokenLogprobs) -> vllm.TopLogProbs:
    return vllm.TopLogProbs(
        values=[top.logprob for top in entry.top], token_ids=[top.token_id for top in entry.top]
    )
