"""Certificates, keys and tokens for tests."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import trustme
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from neo_common.grpc.keys import new_key

ISSUER = "https://issuer.example"
AUDIENCE = "neo"


@dataclass
class Authority:
    """A certificate authority; `issue` writes PEM files into `directory`."""

    directory: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def file(self) -> str:
        path = self.directory / f"ca-{id(self.ca)}.pem"
        self.ca.cert_pem.write_to_path(str(path))
        return str(path)

    def issue(self, name: str, *hosts: str, common_name: str | None = None) -> tuple[str, str]:
        """Paths of NAME.pem and NAME.key, replaced if they exist."""
        certificate = self.ca.issue_cert(*hosts, common_name=common_name)
        pem, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        certificate.private_key_pem.write_to_path(str(key))
        certificate.cert_chain_pems[0].write_to_path(str(pem))
        return str(pem), str(key)


def write_keys(path: Path, **callers: list[str]) -> dict[str, str]:
    """An `api_keys` file with a key for each name, of tenant `NAME-tenant`; name -> key."""
    made = {name: new_key(name, f"{name}-tenant", roles) for name, roles in callers.items()}
    path.write_text(yaml.safe_dump({"keys": [entry for _, entry in made.values()]}))
    return {name: key for name, (key, _) in made.items()}


@dataclass
class Signer:
    """One of the issuer's keys."""

    kid: str
    algorithm: str
    private: Any

    @classmethod
    def make(cls, algorithm: str, kid: str, *, bits: int = 2048) -> Signer:
        if algorithm == "RS256":
            return cls(kid, algorithm, rsa.generate_private_key(65537, bits))
        if algorithm == "ES256":
            return cls(kid, algorithm, ec.generate_private_key(ec.SECP256R1()))
        return cls(kid, algorithm, ed25519.Ed25519PrivateKey.generate())

    def jwk(self) -> dict[str, Any]:
        kind = jwt.get_algorithm_by_name(self.algorithm)
        public: dict[str, Any] = json.loads(kind.to_jwk(self.private.public_key()))
        return {**public, "kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def token(self, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """Valid for a minute unless `claims` say otherwise; None leaves a claim out."""
        said = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "somebody", "exp": time.time() + 60, **claims,
        }  # fmt: skip
        said = {name: value for name, value in said.items() if value is not None}
        named = {"kid": self.kid} if headers is None else headers
        return jwt.encode(said, self.private, self.algorithm, headers=named)


def jwks(*signers: Signer) -> bytes:
    return json.dumps({"keys": [signer.jwk() for signer in signers]}).encode()
