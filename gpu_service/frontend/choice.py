"""One choice of a request, from the engine's tokens to the deltas that its client sees."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_service.engine.messages import ChoiceDelta, TokenLogprob
from gpu_service.frontend.stop import StopFinder
from gpu_service.model.tokenizer import DetokenizeStream
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

_FINISH = {
    "stop": types.FINISH_REASON_STOP,
    "length": types.FINISH_REASON_LENGTH,
    "aborted": types.FINISH_REASON_ABORTED,
}


class ChoiceStream:
    """Detokenises, finds stop strings, and collects what the client has not been sent yet.

    detokenizer: None when only token ids were asked for.
    """

    def __init__(
        self, index: int, detokenizer: DetokenizeStream | None, stop: Sequence[str]
    ) -> None:
        self.index = index
        self._detokenizer = detokenizer
        self._stop = StopFinder(stop)
        self._pending = inference.Choice(index=index)
        self._has_news = False
        self.tokens = 0
        """Delivered to the client."""
        self.finished = False

    def take_in(self, delta: ChoiceDelta) -> bool:
        """Returns True when a stop string ended the choice and the engine does not know yet."""
        if self.finished:  # tokens past a stop string, already on their way
            return False
        self._has_news = True
        # The token that made the engine stop is a token of the answer, but not of its text.
        silent = delta.finish == "stop"
        for position, token in enumerate(delta.token_ids):
            logprob = delta.logprobs[position] if delta.logprobs else None
            self._add_token(token, logprob)
            if silent and position == len(delta.token_ids) - 1:
                break
            if self._add_text(token):
                self._finish(types.FINISH_REASON_STOP)
                self._pending.stop_string = self._stop.found or ""
                return delta.finish is None
        if delta.finish is not None:
            self._end(delta)
        return False

    def take_out(self) -> inference.Choice | None:
        """What is new since the last call."""
        if not self._has_news:
            return None
        out, self._pending = self._pending, inference.Choice(index=self.index)
        self._has_news = False
        return out

    def _add_token(self, token: int, logprob: TokenLogprob | None) -> None:
        self.tokens += 1
        self._pending.token_ids.append(token)
        if logprob is not None:
            self._pending.logprobs.append(logprob_message(logprob))

    def _add_text(self, token: int) -> bool:
        """True when a stop string is complete."""
        if self._detokenizer is None:
            return False
        self._pending.text += self._stop.feed(self._detokenizer.step(token))
        return self._stop.found is not None

    def _end(self, delta: ChoiceDelta) -> None:
        """The engine ended the choice; what was held back comes out, or turns out to be a stop."""
        assert delta.finish is not None
        reason = _FINISH[delta.finish]
        if self._detokenizer is not None:
            self._pending.text += self._stop.feed(self._detokenizer.flush())
            if self._stop.found is not None:
                self._pending.stop_string = self._stop.found
                self._finish(types.FINISH_REASON_STOP)
                return
            self._pending.text += self._stop.flush()
        if delta.stop_token_id is not None:
            self._pending.stop_token_id = delta.stop_token_id
        self._finish(reason)

    def _finish(self, reason: types.FinishReason) -> None:
        self._pending.finish_reason = reason
        self.finished = True


def logprob_message(logprob: TokenLogprob) -> types.TokenLogprobs:
    return types.TokenLogprobs(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top=[types.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top],
    )
