"""TLS of the HTTP listener, from the same files as gRPC's; see neo_common.grpc.tls."""

from __future__ import annotations

import ssl
from typing import Any

from neo_common.grpc.tls import TlsFiles
from neo_common.watched import Watched


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Each new connection gets the certificate that is in the files then. Raises ValueError."""

    def load() -> ssl.SSLContext:
        files.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.certificate, files.key, password="")
        context.set_alpn_protocols(["http/1.1"])
        if files.ca:
            context.load_verify_locations(files.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    watched = Watched(files.paths, load)

    def newest(connection: Any, name: str | None, listening: ssl.SSLContext) -> None:
        connection.context = watched.get()

    listening = load()
    # Named so for what it was made for; it is called whether or not the client names a server.
    listening.sni_callback = newest
    return listening
