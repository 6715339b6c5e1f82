"""What config.json says of quantised weights: fp8 of the kinds that we read, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_service.model.bounds import shown


def quantization_of(config: Any, where: Path) -> str:
    """ "" for plain weights, "fp8" for e4m3 weights with a scale per tensor or output channel.

    config: the value of `quantization_config`, None if there is none. Scales of activations are
    not read: each row gets its own when it comes.
    """
    if not config:
        return ""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: quantization_config is {shown(config)}, not an object")
    method = config.get("quant_method")
    if method == "fp8":
        if config.get("weight_block_size"):
            raise ValueError(f"{where}: fp8 weights with a scale per block are not supported")
        return "fp8"
    if method != "compressed-tensors":
        raise ValueError(
            f"{where}: quant_method {shown(method)} is not supported (fp8 and compressed-tensors "
            "with float-quantized weights are; so are GGUF files)"
        )
    if config.get("format") != "float-quantized":
        raise ValueError(
            f"{where}: compressed-tensors of format {shown(config.get('format'))} are not "
            "supported (float-quantized is)"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{where}: quantization_config has no config_groups")
    for group in groups.values():
        _check_weights(group.get("weights") if isinstance(group, dict) else None, where)
    return "fp8"


def _check_weights(weights: Any, where: Path) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"{where}: quantization_config has a group without weights")
    wanted = {"num_bits": (8,), "type": ("float",), "strategy": ("channel", "tensor")}
    for key, allowed in wanted.items():
        if weights.get(key) not in allowed:
            names = " and ".join(str(value) for value in allowed)
            raise ValueError(
                f"{where}: quantised weights whose {key} is {shown(weights.get(key))} are not "
                f"supported ({names} are)"
            )
