"""A model's chat template: Jinja that comes with the checkpoint, run in a sandbox.

Helpers and whitespace rules are those that templates on the Hugging Face hub are written against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """Compiled once; `render` may be called from any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: "bos_token", "eos_token", ... as the template may use them.

        ValueError if the template is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template is not valid: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for `messages` (mappings with "role" and "content").

        ValueError if the template refuses them; the sentence holds the template's own words."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _Refusal as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        # A template is a program: it may divide by zero or index past the end of what it was given.
        except Exception as error:
            kind = type(error).__name__
            raise ValueError(f"messages: the chat template failed on them ({kind})") from error


class _Refusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training, is transparent here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts want plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
