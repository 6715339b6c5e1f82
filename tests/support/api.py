"""What may change in neo.v1: anything may be added, nothing removed, renumbered or retyped.

python -m tests.support.api      at a release: what is declared now becomes the promise
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from protos.neo.v1 import (
    cpu_attention_pb2,
    engine_pb2,
    inference_pb2,
    machine_pb2,
    router_pb2,
    types_pb2,
)

RELEASED = Path(__file__).resolve().parents[1] / "meta/data/neo_v1.binpb"

Facts = dict[str, Any]
"""Name of a thing -> what clients rely on of it."""


def declared() -> FileDescriptorSet:
    """What the generated stubs say now."""
    found = FileDescriptorSet()
    for module in (
        cpu_attention_pb2,
        engine_pb2,
        inference_pb2,
        machine_pb2,
        router_pb2,
        types_pb2,
    ):
        module.DESCRIPTOR.CopyToProto(found.file.add())
    return found


def released() -> FileDescriptorSet:
    return FileDescriptorSet.FromString(RELEASED.read_bytes())


def breaking(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """Each promise of `old` that `new` does not keep."""
    promised, kept = facts(old), facts(new)
    problems = []
    for name, fact in promised.items():
        if name not in kept:
            problems.append(f"{name} is gone")
        elif kept[name] != fact:
            problems.append(f"{name} was {fact} and is {kept[name]}")
    return problems


def facts(files: FileDescriptorSet) -> Facts:
    found: Facts = {}
    for file in files.file:
        found |= dict(_of_file(file))
    return found


def _of_file(file: FileDescriptorProto) -> Iterator[tuple[str, Any]]:
    for message in file.message_type:
        yield from _of_message(message, f"{file.package}.{message.name}")
    for enum in file.enum_type:
        yield from _of_enum(enum, f"{file.package}.{enum.name}")
    for service in file.service:
        for method in service.method:
            yield (
                f"{file.package}.{service.name}/{method.name}",
                {
                    "request": method.input_type,
                    "response": method.output_type,
                    "streams": (method.client_streaming, method.server_streaming),
                },
            )


def _of_message(message: DescriptorProto, name: str) -> Iterator[tuple[str, Any]]:
    yield name, "a message"
    for field in message.field:
        # A oneof that protoc makes up for an optional field says nothing more than that it is one.
        within = field.HasField("oneof_index") and not field.proto3_optional
        yield (
            f"{name}.{field.name}",
            {
                "number": field.number,
                "type": field.type,
                "of": field.type_name,
                "label": field.label,
                "optional": field.proto3_optional,
                "oneof": message.oneof_decl[field.oneof_index].name if within else "",
            },
        )
    for inner in message.nested_type:
        yield from _of_message(inner, f"{name}.{inner.name}")
    for enum in message.enum_type:
        yield from _of_enum(enum, f"{name}.{enum.name}")


def _of_enum(enum: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, "an enum"
    for value in enum.value:
        yield f"{name}.{value.name}", {"number": value.number}


def main() -> int:
    now = declared()
    problems = breaking(released(), now) if RELEASED.exists() else []
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    RELEASED.write_bytes(now.SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
