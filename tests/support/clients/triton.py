"""tritonclient against GRPCInferenceService; prints what each scenario found as JSON."""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton

MODEL = "tiny"
PROMPT = "the quick brown fox"
GREEDY = {"temperature": "0", "max_tokens": "6", "ignore_eos": True}


def inputs(prompt: str = PROMPT, *, stream: bool = False, **parameters: Any) -> list[Any]:
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    streaming = triton.InferInput("stream", [1], "BOOL")
    streaming.set_data_from_numpy(np.array([stream]))
    excluded = triton.InferInput("exclude_input_in_output", [1], "BOOL")
    excluded.set_data_from_numpy(np.array([True]))
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    said = json.dumps({**GREEDY, **parameters}).encode()
    sampling.set_data_from_numpy(np.array([said], dtype=np.object_))
    return [text, streaming, excluded, sampling]


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [element.decode() for element in result.as_numpy(name)]


def described(client: Any) -> dict[str, Any]:
    config = client.get_model_config(MODEL).config
    metadata = client.get_model_metadata(MODEL)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "server": client.get_server_metadata().name,
        "decoupled": config.model_transaction_policy.decoupled,
        "inputs": [tensor.name for tensor in metadata.inputs],
        "outputs": [tensor.name for tensor in metadata.outputs],
        "index": [(m.name, m.state) for m in client.get_model_repository_index().models],
    }


def infer(client: Any) -> dict[str, Any]:
    names = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "logprobs"]
    wanted = [triton.InferRequestedOutput(name) for name in names]
    result = client.infer(MODEL, inputs(n=2, logprobs=1), outputs=wanted, request_id="seven")
    return {
        "id": result.get_response().id,
        "texts": texts(result),
        "reasons": texts(result, "finish_reason"),
        "prompt_tokens": result.as_numpy("num_input_tokens").tolist(),
        "tokens": result.as_numpy("num_output_tokens").tolist(),
        "logprobs": [json.loads(text) for text in texts(result, "logprobs")],
    }


def tensors(client: Any) -> dict[str, Any]:
    """Parameters as tensors, the prompt as ids, the prompt kept in front of a text's output."""
    ids = triton.InferInput("input_ids", [4], "INT64")
    ids.set_data_from_numpy(np.array([3, 4, 5, 6], dtype=np.int64))
    count = triton.InferInput("max_tokens", [1], "INT32")
    count.set_data_from_numpy(np.array([3], dtype=np.int32))
    cold = triton.InferInput("temperature", [1], "FP32")
    cold.set_data_from_numpy(np.array([0.0], dtype=np.float32))
    wanted = [triton.InferRequestedOutput("num_output_tokens")]
    by_ids = client.infer(MODEL, [ids, count, cold], outputs=wanted)
    whole = client.infer(
        MODEL, inputs()[:1], parameters={"max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
    )
    return {"tokens": by_ids.as_numpy("num_output_tokens").tolist(), "whole": texts(whole)}


def stream(client: Any) -> dict[str, Any]:
    """Three requests on one stream: one streams, one is whole, one is wrong."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer(MODEL, inputs(stream=True), request_id="a")
    client.async_stream_infer(MODEL, inputs(), request_id="b", enable_empty_final_response=True)
    client.async_stream_infer(MODEL, inputs(no_such_parameter=1), request_id="c")
    found: dict[str, Any] = {"a": [], "b": [], "error": "", "finals": []}
    while len(found["finals"]) < 2 or not found["error"]:
        result, error = answers.get(timeout=60)
        if error is not None:
            found["error"] = str(error)
            continue
        response = result.get_response()
        if response.outputs:
            found[response.id] += texts(result)
        if response.parameters["triton_final_response"].bool_param:
            found["finals"].append([response.id, len(response.outputs)])
    client.stop_stream()
    return found


def refused(client: Any) -> dict[str, str]:
    def error(call: Callable[[], Any]) -> str:
        try:
            call()
        except triton.InferenceServerException as refusal:
            return f"{refusal.status()}: {refusal.message()}"
        return "no error"

    return {
        "model": error(lambda: client.infer("another", inputs())),
        "version": error(lambda: client.get_model_config(MODEL, "2")),
        "parameter": error(lambda: client.infer(MODEL, inputs(temperature=-1))),
        "type": error(lambda: client.infer(MODEL, inputs(max_tokens="many"))),
        "prompt": error(lambda: client.infer(MODEL, inputs()[1:])),
        "streamed": error(lambda: client.infer(MODEL, inputs(stream=True))),
        "output": error(
            lambda: client.infer(MODEL, inputs(), outputs=[triton.InferRequestedOutput("no_such")])
        ),
        "loading": error(lambda: client.load_model(MODEL)),
    }


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1]) as connected:
        scenarios = (described, infer, tensors, stream, refused)
        print(json.dumps({scenario.__name__: scenario(connected) for scenario in scenarios}))
