"""A model's tokenizer as a zip archive, for clients that tokenize themselves."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.gguf_tokenizer import special_tokens, tokenizer_from_gguf
from gpu_service.model.spec import resolve_model

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
"""Of a checkpoint's directory, what tokenizer libraries read."""


@dataclass(frozen=True)
class Archive:
    data: bytes
    sha256: str
    """In hex."""


def build_archive(model: str | Path) -> Archive:
    """The checkpoint's own files; of a GGUF file, which has none, their equivalent.

    The same model gives the same bytes. Takes up to seconds. Raises OSError or ValueError."""
    path = resolve_model(model)
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in NAMES if (path / name).is_file()}
    else:
        files = _from_gguf(GgufFile(path))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            # A fixed date: the archive's hash is the tokenizer's identity.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    data = buffer.getvalue()
    return Archive(data, hashlib.sha256(data).hexdigest())


def _from_gguf(file: GgufFile) -> dict[str, bytes]:
    settings: dict[str, str] = special_tokens(file)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return {
        "tokenizer.json": tokenizer_from_gguf(file).to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
