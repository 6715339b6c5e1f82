"""API keys and the rule of a listener, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from neo_common.errors import Reason, ServiceError
from neo_common.grpc.auth import Access, Authenticator, needed
from neo_common.grpc.keys import ApiKeys, new_key
from neo_common.grpc.principal import ANONYMOUS, Principal, Role
from neo_common.grpc.settings import ListenSettings, PeerSettings, admin_address
from tests.support.credentials import write_keys

INFERENCE = "/neo.v1.InferenceService/Generate"
WATCH = "/neo.v1.EngineService/WatchLoad"
DRAIN = "/neo.v1.EngineService/Drain"
HEALTH = "/grpc.health.v1.Health/Check"


class Call:
    """What Access looks at of a call's context."""

    def __init__(self, *metadata: tuple[str, str], names: tuple[bytes, ...] = ()) -> None:
        self._metadata = metadata
        self._names = names

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> Any:
        return {"x509_subject_alternative_name": self._names, "x509_common_name": [b""]}


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


async def why(access: Access, method: str, call: Call) -> Reason:
    with pytest.raises(ServiceError) as caught:
        await access.admit(method, call)
    return caught.value.reason


def test_a_key_is_found_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    made = write_keys(path, ci=["inference"], ops=["admin", "inference"])
    assert all(key not in path.read_text() for key in made.values()), "the file holds no key"
    keys = ApiKeys(str(path))
    assert keys.find(made["ci"]) == Principal("ci", "ci-tenant", frozenset({Role.INFERENCE}))
    identity = made["ci"].split("_")[1]
    other = made["ops"].split("_")[2]
    for wrong in (
        f"neo_{identity}_{other}", made["ci"][:-1], made["ci"] + "0", made["ci"].upper(), "",
        f"neo_{identity}_{'0' * 64}", "neo_00000000_" + other,
    ):  # fmt: skip
        assert keys.find(wrong) is None, wrong


def test_keys_come_and_go_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    old = write_keys(path, ci=["inference"])["ci"]
    keys = ApiKeys(str(path))
    new = write_keys(path, ci=["inference"], second=["inference"])["second"]
    assert keys.find(old) is None
    assert keys.find(new) is not None
    path.write_text("keys: [")
    assert keys.find(new) is not None, "a broken file leaves the last good one in use"
    path.unlink()
    assert keys.find(new) is not None
    path.write_text("keys: []")
    assert keys.find(new) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sha256": "neo_12345678_secret"}, "sha256 must be"),
        ({"id": 12345678}, None),
        ({"id": 1}, "id must be text"),
        ({"roles": ["root"]}, "roles must be a list of inference, admin, service"),
        ({"roles": []}, "roles must be a list"),
        ({"tenant": "x" * 200}, "tenant must be"),
        ({"key": "x"}, "exactly the fields"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, change: Any, problem: str | None) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [{**new_key("a", "t", ["admin"])[1], **change}]}))
    if problem is None:
        ApiKeys(str(path))
        return
    with pytest.raises(ValueError, match=problem) as caught:
        ApiKeys(str(path))
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="api_keys: cannot read"):
        ApiKeys(str(tmp_path / "absent"))


def test_ids_must_be_unique(tmp_path: Path) -> None:
    _, entry = new_key("a", "t", ["admin"])
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [entry, entry]}))
    with pytest.raises(ValueError, match="twice"):
        ApiKeys(str(path))


def test_methods_that_nobody_thought_of_need_a_role() -> None:
    assert needed(HEALTH) == frozenset()
    assert needed("/grpc.health.v1.HealthX/Check")
    assert needed("/new.v1.Service/Do")
    assert Role.INFERENCE not in needed(DRAIN) | needed("/neo.v1.RouterService/ListBackends")
    assert needed("/neo.v1.CpuAttentionService/Attend") == {Role.SERVICE}


async def test_without_authentication_only_operators_calls_are_closed_to_the_world() -> None:
    world, loopback = Access(None, private=False), Access(None, private=True)
    assert await world.admit(INFERENCE, Call()) is ANONYMOUS
    assert (await world.admit(INFERENCE, Call(("x-neo-tenant", "t9")))).tenant == "t9"
    assert await world.admit(WATCH, Call())
    assert await why(world, DRAIN, Call()) is Reason.PERMISSION_DENIED
    assert await loopback.admit(DRAIN, Call())
    assert await why(world, INFERENCE, Call(("x-neo-tenant", "a" * 129))) is Reason.INVALID_ARGUMENT


async def test_roles_decide(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    made = write_keys(path, user=["inference"], ops=["admin"], router=["service"])
    user, ops, router = (Call(bearer(made[name])) for name in ("user", "ops", "router"))
    access = Access(Authenticator(ListenSettings(api_keys=str(path))), private=True)
    assert await access.admit(HEALTH, Call())
    for method in (INFERENCE, WATCH, DRAIN, "/new.v1.Service/Do"):
        for call in (
            Call(), Call(bearer("neo_x")), Call(("authorization", made["user"])),
            Call(bearer("")), Call(("authorization", "Basic abc")), Call(bearer("a.b.c")),
        ):  # fmt: skip
            assert await why(access, method, call) is Reason.UNAUTHENTICATED
    assert (await access.admit(INFERENCE, user)).tenant == "user-tenant"
    assert await why(access, WATCH, user) is Reason.PERMISSION_DENIED
    assert await why(access, DRAIN, user) is Reason.PERMISSION_DENIED
    for call in (ops, router):
        for method in (INFERENCE, WATCH, DRAIN):
            assert await access.admit(method, call)
    router_service = "/neo.v1.RouterService/DrainBackend"
    assert await why(access, router_service, router) is Reason.PERMISSION_DENIED
    assert await access.admit(router_service, ops)


async def test_only_a_service_speaks_for_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    made = write_keys(path, user=["inference"], router=["service"])
    access = Access(Authenticator(ListenSettings(api_keys=str(path))), private=False)
    claim = ("x-neo-tenant", "rich")
    assert (await access.admit(INFERENCE, Call(bearer(made["user"]), claim))).tenant == (
        "user-tenant"
    )
    assert (await access.admit(INFERENCE, Call(bearer(made["router"]), claim))).tenant == "rich"


async def test_holders_of_certificates() -> None:
    roles = ("router.neo=service", "ops.neo=admin", "ops.neo=inference", "*=inference")
    settings = ListenSettings(tls_cert="c", tls_key="k", tls_ca="a", tls_client_roles=roles)
    access = Access(Authenticator(settings), private=False)
    assert (await access.admit(WATCH, Call(names=(b"router.neo", b"other")))).name == "router.neo"
    assert await access.admit(DRAIN, Call(names=(b"ops.neo",)))
    stranger = Call(names=(b"stranger",))
    assert (await access.admit(INFERENCE, stranger)).tenant == "stranger"
    assert await why(access, DRAIN, stranger) is Reason.PERMISSION_DENIED
    assert await why(access, INFERENCE, Call()) is Reason.UNAUTHENTICATED
    listed = Access(
        Authenticator(ListenSettings(tls_client_roles=("router.neo=service",))), private=False
    )
    assert await why(listed, INFERENCE, stranger) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert": "c"}, "given together"),
        ({"tls_ca": "c"}, "tls_ca needs tls_cert"),
        ({"tls_client_roles": ("a=admin",)}, "tls_client_roles needs tls_ca"),
        (
            {"tls_cert": "c", "tls_key": "k", "tls_ca": "a", "tls_client_roles": ("a=root",)},
            "NAME=ROLE",
        ),
        ({"jwt_keys": "f"}, "jwt_keys needs jwt_issuer"),
        ({"max_connection_streams": 0}, "max_connection_streams"),
        ({"max_connection_age_seconds": -1.0}, "max_connection_age_seconds"),
    ],
)
def test_settings_that_do_not_fit_together(settings: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ListenSettings(**settings).validate_listener()


def test_peer_settings_and_urls_that_do_not_fit() -> None:
    for name in ("peer_tls_cert", "peer_tls_name", "peer_api_key"):
        with pytest.raises(ValueError, match=f"{name} needs peer_tls_ca"):
            PeerSettings(**{name: "x"}).validate_peers()
    with pytest.raises(ValueError, match="given together"):
        PeerSettings(peer_tls_ca="system", peer_tls_key="k").validate_peers()
    with pytest.raises(ValueError, match="https URL"):
        Authenticator(
            ListenSettings(jwt_keys="http://issuer/keys", jwt_issuer="i", jwt_audience="a")
        )


@pytest.mark.parametrize(
    ("listen", "given", "found"),
    [
        ("127.0.0.1:7000", "auto", None),
        ("[::1]:7000", "auto", None),
        ("localhost:7000", "auto", None),
        ("0.0.0.0:7000", "auto", "127.0.0.1:7010"),
        ("[::]:7001", "auto", "127.0.0.1:7011"),
        ("0.0.0.0:0", "auto", "127.0.0.1:0"),
        ("127.0.0.1:7000", "127.0.0.1:7777", "127.0.0.1:7777"),
    ],
)
def test_where_operators_are_served(listen: str, given: str, found: str | None) -> None:
    assert admin_address(listen, given) == found
