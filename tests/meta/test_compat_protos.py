"""Our declarations of other projects' protocols against their own stubs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

THEIRS = {
    "kserve": ("tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2"),
    "vllm_engine": ("smg_grpc_proto.generated.vllm_engine_pb2",),
    "smg_common": ("smg_grpc_proto.generated.common_pb2",),
}
DESCRIBE = """
import importlib, json, sys
found = {}
def describe(message):
    found[message.full_name] = {
        field.name: [field.number, field.type, field.is_repeated,
                     field.containing_oneof.name if field.containing_oneof else None]
        for field in message.fields
    }
    for inner in message.nested_types:
        describe(inner)
for name in sys.argv[1:]:
    file = importlib.import_module(name).DESCRIPTOR
    for message in file.message_types_by_name.values():
        describe(message)
    for enum in file.enum_types_by_name.values():
        found[enum.full_name] = {value.name: value.number for value in enum.values}
    for service in file.services_by_name.values():
        found[service.full_name] = {
            method.name: [method.input_type.full_name, method.output_type.full_name,
                          method.client_streaming, method.server_streaming]
            for method in service.methods
        }
print(json.dumps(found))
"""
BYTES, MESSAGE = 12, 11


def described(*modules: str) -> dict[str, Any]:
    """In a process of its own: both sides register the same names."""
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *modules], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_names_and_numbers_are_theirs(name: str) -> None:
    ours, theirs = described(f"protos.compat.{name}_pb2"), described(*THEIRS[name])
    assert ours
    for full_name, members in ours.items():
        assert full_name in theirs
        for member, said in members.items():
            real = theirs[full_name].get(member)
            if isinstance(said, list) and said[1] == BYTES and real[1] == MESSAGE:
                said[1] = MESSAGE  # declared as bytes, to be seen and refused
            assert said == real, f"{full_name}.{member}"
