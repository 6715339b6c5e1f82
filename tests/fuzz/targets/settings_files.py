"""YAML that operators write: settings, tenants, API keys, prices. The first byte says which."""

from __future__ import annotations

import yaml

from neo_client.prices import read_prices
from neo_common.config import build, read_file
from neo_common.grpc.keys import load_keys, new_key
from router.admission.policy import load_policy
from router.config import RouterConfig
from tests.fuzz import files
from tests.fuzz.target import Target, clear


def _one(data: bytes) -> None:
    path = files.file("settings.yaml", data[1:])
    kind = data[:1]
    try:
        if kind == b"k":
            load_keys(str(path))
        elif kind == b"t":
            load_policy(str(path))
        elif kind == b"p":
            read_prices(str(path))
        else:
            build(RouterConfig, read_file(RouterConfig, path))
    except ValueError as error:
        clear(error)


def seeds() -> list[bytes]:
    entry = new_key("name", "tenant", ["inference", "admin"])[1]
    tenants = {
        "max_running": 64, "default": {"max_running": 8, "tokens_per_minute": 60000},
        "tenants": {"acme": {"weight": 4, "max_class": "low"}},
    }  # fmt: skip
    machine = {"gpus": 1, "cores": 16, "host_gib": 64, "per_hour": 2.5}
    return [
        b"k" + yaml.safe_dump({"keys": [entry]}).encode(),
        b"t" + yaml.safe_dump(tenants).encode(),
        b"p" + yaml.safe_dump({"machines": {"a": machine}, "currency": "EUR"}).encode(),
        b"c"
        + yaml.safe_dump({"listen": "127.0.0.1:7000", "backends": ["127.0.0.1:7001"]}).encode(),
    ]


_WORDS = (b"!!int ", b"!!timestamp x", b"!!float ''", b"&a ", b"*a", b"<<: ", b"- ", b"2001-99-99")
TARGET = Target("settings_files", _one, seeds, "text", _WORDS, max_bytes=1024)
