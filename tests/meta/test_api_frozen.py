"""neo.v1 keeps what the last release promised (`tests/meta/data/neo_v1.binpb`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

from tests.support.api import breaking, declared, released


def test_nothing_that_was_released_has_changed() -> None:
    problems = breaking(released(), declared())
    assert not problems, "neo.v1 is frozen, add instead of changing:\n" + "\n".join(problems)


def message(files: FileDescriptorSet, name: str) -> Any:
    return next(m for file in files.file for m in file.message_type if m.name == name)


def field(files: FileDescriptorSet, name: str, of: str = "GenerateRequest") -> Any:
    return next(f for f in message(files, of).field if f.name == name)


def service(files: FileDescriptorSet, name: str) -> Any:
    return next(s for file in files.file for s in file.service if s.name == name)


def enum(files: FileDescriptorSet, name: str) -> Any:
    return next(e for file in files.file for e in file.enum_type if e.name == name)


def drop(sequence: Any, name: str) -> None:
    del sequence[next(n for n, each in enumerate(sequence) if each.name == name)]


def set_to(thing: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(thing, name, value)


BREAKING: dict[str, Callable[[FileDescriptorSet], None]] = {
    "field removed": lambda new: drop(message(new, "GenerateRequest").field, "model"),
    "field renamed": lambda new: set_to(field(new, "model"), name="name"),
    "field renumbered": lambda new: set_to(field(new, "model"), number=99),
    "field retyped": lambda new: set_to(field(new, "model"), type=FieldDescriptorProto.TYPE_BYTES),
    "field made repeated": lambda new: set_to(
        field(new, "model"), label=FieldDescriptorProto.LABEL_REPEATED
    ),
    "field of another message": lambda new: set_to(
        field(new, "sampling"), type_name=".neo.v1.Usage"
    ),
    "field taken out of its oneof": lambda new: field(new, "text").ClearField("oneof_index"),
    "presence lost": lambda new: set_to(
        field(new, "temperature", "SamplingParams"), proto3_optional=False
    ),
    "message removed": lambda new: drop(new.file[-1].message_type, "Usage"),
    "method removed": lambda new: drop(service(new, "InferenceService").method, "Abort"),
    "method streams": lambda new: set_to(
        service(new, "InferenceService").method[0], client_streaming=True
    ),
    "method answers otherwise": lambda new: set_to(
        service(new, "EngineService").method[0], output_type=".neo.v1.Usage"
    ),
    "value removed": lambda new: drop(enum(new, "FinishReason").value, "FINISH_REASON_LENGTH"),
    "value renumbered": lambda new: set_to(enum(new, "FinishReason").value[1], number=77),
    "package moved": lambda new: set_to(new.file[0], package="neo.v2"),
}


@pytest.mark.parametrize("change", BREAKING)
def test_each_kind_of_change_is_noticed(change: str) -> None:
    new = declared()
    BREAKING[change](new)
    assert breaking(declared(), new)


def test_additions_are_welcome() -> None:
    new = declared()
    message(new, "GenerateRequest").field.add(
        name="new", number=1000, type=FieldDescriptorProto.TYPE_STRING,
        label=FieldDescriptorProto.LABEL_OPTIONAL,
    )  # fmt: skip
    new.file[0].message_type.add(name="New")
    enum(new, "FinishReason").value.add(name="FINISH_REASON_NEW", number=1000)
    service(new, "InferenceService").method.add(
        name="New", input_type=".neo.v1.New", output_type=".neo.v1.New"
    )
    assert not breaking(declared(), new)
    assert len(breaking(new, declared())) == 4
