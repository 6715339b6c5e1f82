"""TLS of listeners and channels, from PEM files that may be replaced while in use.

gRPC speaks TLS 1.2 and 1.3 only, and a client verifies the server's name; neither can be turned
off here.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import grpc

from neo_common.watched import Watched, read


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files. prefix: of the settings that they come from, for messages."""

    certificate: str
    """Our certificate, followed by its intermediates."""
    key: str
    ca: str
    """Who must have signed the other side's certificate; "" asks for none (a server), or takes
    the system's authorities (a client)."""
    prefix: str

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.certificate, self.key, self.ca) if path]

    def check(self) -> None:
        """Raises ValueError, naming the setting, for files that are missing or no PEM, and for a
        key that is not the certificate's."""
        if bool(self.certificate) != bool(self.key):
            raise ValueError(f"{self.prefix}_cert and {self.prefix}_key must be given together")
        if self.certificate:
            read(self.certificate, f"{self.prefix}_cert")
            read(self.key, f"{self.prefix}_key")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                # The password keeps OpenSSL from asking for one on the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
            except (ssl.SSLError, OSError) as error:
                raise ValueError(
                    f"{self.prefix}_cert, {self.prefix}_key: {self.certificate} and {self.key} must"
                    f" be a PEM certificate and its unencrypted private key"
                ) from error
        if self.ca:
            pem = read(self.ca, f"{self.prefix}_ca")
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                    cadata=pem.decode("ascii")
                )
            except (ssl.SSLError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self.prefix}_ca: {self.ca} must hold PEM certificates"
                ) from error


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For `add_secure_port`. Each new connection gets the certificate that is in the files then;
    those that are open stay. With `ca`, clients must show a certificate. Raises ValueError."""

    def load() -> grpc.ServerCertificateConfiguration:
        files.check()
        chain = read(files.certificate, f"{files.prefix}_cert")
        key = read(files.key, f"{files.prefix}_key")
        ca = read(files.ca, f"{files.prefix}_ca") if files.ca else None
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=ca)

    watched = Watched(files.paths, load)
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=bool(files.ca)
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """For `secure_channel`, of what is in the files now. Raises ValueError."""
    files.check()
    return grpc.ssl_channel_credentials(
        read(files.ca, f"{files.prefix}_ca") if files.ca else None,
        read(files.key, f"{files.prefix}_key") if files.key else None,
        read(files.certificate, f"{files.prefix}_cert") if files.certificate else None,
    )
