"""config.json of a Hugging Face directory."""

from __future__ import annotations

import json

from gpu_service.model.spec import read_spec
from gpu_service.model.weights import model_tensors, weight_bytes
from tests.fuzz import files
from tests.fuzz.target import Target, clear


def _one(data: bytes) -> None:
    path = files.file("hf/config.json", data)
    try:
        spec = read_spec(path.parent)
    except ValueError as error:
        clear(error, "config.json")
        return
    import torch

    from gpu_service.model.rope import inverse_frequencies

    weight_bytes(model_tensors(spec), torch.float32, fp8=False)
    if spec.head_dim < 4096:
        inverse_frequencies(spec.rope, spec.head_dim)


def seeds() -> list[bytes]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    fp8 = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "a": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        },
    }
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    changes = [
        {}, {"rope_scaling": yarn}, {"rope_scaling": llama3}, {"quantization_config": fp8},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"model_type": "mistral"},
        {"model_type": "qwen2", **window}, {"model_type": "qwen3", "layer_types": ["x"]},
    ]  # fmt: skip
    return [json.dumps({**files.CONFIG, **change}).encode() for change in changes]


TARGET = Target("model_config", _one, seeds, "text", (b"1e308", b"1000000000", b"9" * 400))
