"""Chat templates: the helpers and whitespace that templates count on, and a sandbox that holds."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gpu_service.model.chat import ChatTemplate

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": '<b>é & "x"</b>'},
    {"role": "assistant", "content": "A"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "loops and blocks": """
        {%- for message in messages %}
            {% if loop.index0 == 1 %}{% continue %}{% endif %}
            {{ message['role'] }}: {{ message.content | trim }}{{ eos_token }}
        {% endfor %}
        {% if add_generation_prompt %}go{% endif %}
""",
    "json": "{{ messages | tojson }} {{ messages[1] | tojson(indent=2, sort_keys=True) }}",
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.role }}\n{% endgeneration %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}"
    ),
    "undefined": "{% if tools %}T{% endif %}{% if custom is defined %}C{% endif %}{{ missing }}.",
    "none": "{% if documents is none %}no documents{% endif %}{{ bos_token + 'x' }}",
    "slices": "{{ messages[::-1][0].content }}{{ messages[1:] | length }}{{ 'a,b'.split(',')[1] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers(name: str, prompt: bool) -> None:
    (expected,), _ = render_jinja_template(
        [CHAT], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **SPECIAL
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(CHAT, add_generation_prompt=prompt) == expected


def test_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHAT) == str(datetime.now().year)


def test_template_that_refuses() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ValueError, match="messages: the chat template refuses them: roles must"):
        template.render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content + 'x' }}",
        "{{ 1 / 0 }}",
        "{{ messages.append({}) }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{% include 'secret' %}",
    ],
)
def test_template_that_fails_says_no_prompt_text(source: str) -> None:
    with pytest.raises(ValueError, match="messages: the chat template failed on them") as caught:
        ChatTemplate(source, {}).render(CHAT)
    assert "<b>" not in str(caught.value)


def test_template_that_is_not_jinja() -> None:
    with pytest.raises(ValueError, match="the model's chat template is not valid"):
        ChatTemplate("{% for %}", {})


def test_messages_are_not_changed() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    template = ChatTemplate("{% set _ = messages[0].update({'content': 'y'}) %}", {})
    with pytest.raises(ValueError, match="SecurityError"):
        template.render(messages)
    assert messages == [{"role": "user", "content": "x"}]
