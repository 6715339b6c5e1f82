"""Channels from one service of ours to another: TLS and the API key to present."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from neo_common.grpc.settings import PeerSettings
from neo_common.grpc.tls import channel_credentials
from neo_common.watched import Watched, read

Options = tuple[tuple[str, str | int], ...]


class _Bearer(grpc.AuthMetadataPlugin):
    """Sends the API key that is in the file when a call begins."""

    def __init__(self, path: str) -> None:
        def load() -> str:
            key = read(path, "peer_api_key").decode("ascii", "replace").strip()
            if not key.isprintable() or not key:
                raise ValueError(f"peer_api_key: {path} must hold one API key")
            return key

        self._key = Watched([path], load)

    def __call__(self, context: Any, callback: Callable[..., None]) -> None:
        callback((("authorization", f"Bearer {self._key.get()}"),), None)


def peer_credentials(settings: PeerSettings) -> grpc.ChannelCredentials | None:
    """For channels to other services; None: these are not encrypted. Raises ValueError for files
    that cannot be used."""
    files = settings.peer_tls
    if files is None:
        return None
    credentials = channel_credentials(files)
    if not settings.peer_api_key:
        return credentials
    bearer = grpc.metadata_call_credentials(_Bearer(settings.peer_api_key))
    return grpc.composite_channel_credentials(credentials, bearer)


def peer_options(settings: PeerSettings) -> Options:
    name = settings.peer_tls_name
    return (("grpc.ssl_target_name_override", name),) if name else ()
