"""API keys: `neo_<id>_<secret>`, of which a server keeps the SHA-256 only.

A plain hash is enough: the secret is 256 random bits, which no dictionary holds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neo_common.documents import from_yaml
from neo_common.grpc.principal import MAX_TENANT_CHARS, Principal, Role
from neo_common.watched import Watched, read

PREFIX = "neo_"
_KEY = re.compile(r"neo_([0-9a-f]{8})_([0-9a-f]{64})")
_FIELDS = {"id", "name", "tenant", "roles", "sha256"}


@dataclass(frozen=True)
class KeyRecord:
    """One entry of the file."""

    digest: bytes
    principal: Principal


def new_key(name: str, tenant: str, roles: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A fresh key, and its entry under `keys` in the file. Raises ValueError."""
    identity, secret = secrets.token_hex(4), secrets.token_hex(32)
    key = f"{PREFIX}{identity}_{secret}"
    entry = {
        "id": identity,
        "name": name,
        "tenant": tenant,
        "roles": list(roles),
        "sha256": _digest(key).hex(),
    }
    parse_entry(entry)
    return key, entry


class ApiKeys:
    """The keys of one file, which may change. Raises ValueError when it cannot be used."""

    def __init__(self, path: str) -> None:
        self._records = Watched([path], lambda: load_keys(path))

    def find(self, key: str) -> Principal | None:
        """Whose key it is; None if nobody's."""
        found = _KEY.fullmatch(key)
        record = self._records.get().get(found[1]) if found else None
        if record is None or not hmac.compare_digest(record.digest, _digest(key)):
            return None
        return record.principal


def load_keys(path: str) -> dict[str, KeyRecord]:
    """Id -> record. Raises ValueError."""
    data = read(path, "api_keys")
    try:
        content = from_yaml(data)
    except ValueError as error:
        # Not what is wrong with it: that might show a key in the wrong place.
        raise ValueError(f"api_keys: {path} is not YAML") from error
    entries = content.get("keys") if isinstance(content, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError(f"api_keys: {path} must hold a list under `keys`")
    records: dict[str, KeyRecord] = {}
    for number, entry in enumerate(entries):
        try:
            identity, record = parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"api_keys: entry {number} of {path}: {error}") from error
        if identity in records:
            raise ValueError(f"api_keys: {path} holds the id {identity} twice")
        records[identity] = record
    return records


def parse_entry(entry: Any) -> tuple[str, KeyRecord]:
    """(id, record). Raises ValueError naming the field; never with a value, which might be a key in
    the wrong place."""
    if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
        raise ValueError(f"must have exactly the fields {', '.join(sorted(_FIELDS))}")
    texts = {name: str(entry[name]) for name in ("id", "name", "tenant", "sha256")}
    for name, pattern in (("id", "[0-9a-f]{8}"), ("sha256", "[0-9a-f]{64}")):
        if not re.fullmatch(pattern, texts[name]):
            raise ValueError(f"{name} must be text of hexadecimal digits, as `neo keys new` prints")
    if len(texts["tenant"]) > MAX_TENANT_CHARS or not texts["tenant"].isprintable():
        raise ValueError(f"tenant must be at most {MAX_TENANT_CHARS} printable characters")
    roles = entry["roles"]
    if not isinstance(roles, list) or not roles or not all(role in list(Role) for role in roles):
        raise ValueError(f"roles must be a list of {', '.join(Role)}")
    principal = Principal(texts["name"], texts["tenant"], frozenset(map(Role, roles)))
    return texts["id"], KeyRecord(bytes.fromhex(texts["sha256"]), principal)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
