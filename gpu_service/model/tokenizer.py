"""Text to token ids and back, for the front end. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from gpu_service.model.chat import ChatTemplate
from gpu_service.model.detokenize import DetokenizeStream
from gpu_service.model.gguf_file import GgufFile
from gpu_service.model.gguf_spec import spec_from_gguf
from gpu_service.model.gguf_tokenizer import special_tokens, tokenizer_from_gguf
from gpu_service.model.hf_spec import spec_from_directory
from gpu_service.model.spec import resolve_model
from gpu_service.model.token_bytes import TokenBytes
from neo_common.documents import from_json

__all__ = ["DetokenizeStream", "Tokenizer", "load_tokenizer"]


class Tokenizer:
    """One model's tokenizer and chat template. All methods may be called from any thread."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        """Ids that end an output by themselves; the same as in the model's ModelSpec."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        """Ids are below this. The model's own vocabulary may be padded to more."""
        self.longest_token = max(map(len, vocabulary), default=0)
        """Characters."""
        self._token_bytes = TokenBytes(backend)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def to_json(self) -> str:
        """In the form of a `tokenizer.json`."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. add_special_tokens: whatever the model puts around a text (often a
        beginning-of-sequence token). Special tokens written out in the text count as such.

        Other threads go on meanwhile: the library's `encode` holds the interpreter's lock (0.5 s
        for a megabyte), its `encode_batch_fast` does not."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token are left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds within a text; empty for an id without a token."""
        return self._token_bytes.of(token_id)

    def stream(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DetokenizeStream:
        """For the text of an output that follows `prompt_token_ids`. Not thread-safe by itself."""
        return DetokenizeStream(
            self._backend, prompt_token_ids, skip_special_tokens=skip_special_tokens
        )

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Prompt for `messages`, each with "role" and "content", by the model's own template.

        ValueError if the model has none, or if it refuses them."""
        if self._chat_template is None:
            raise ValueError("messages: the model has no chat template")
        text = self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a GGUF file or `smollm2`, or a ValueError."""
    path = resolve_model(model)
    if path.is_dir():
        return _from_directory(path)
    file = GgufFile(path)
    source = file.metadata.get("tokenizer.chat_template")
    template = ChatTemplate(source, special_tokens(file)) if isinstance(source, str) else None
    return Tokenizer(tokenizer_from_gguf(file), spec_from_gguf(file).eos_token_ids, template)


def _from_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # tokenizers raises plain Exception.
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    # A checkpoint may ask to cut or pad, which is for training.
    backend.no_truncation()
    backend.no_padding()
    settings = _settings(directory / "tokenizer_config.json")
    source = _template_source(directory, settings)
    template = ChatTemplate(source, _special_tokens(settings)) if source is not None else None
    return Tokenizer(backend, spec_from_directory(directory).eos_token_ids, template)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return settings


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The file's template goes before the one in the settings, which may be several by name."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`*_token` settings: a string, or an object with the string as its `content`."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found
