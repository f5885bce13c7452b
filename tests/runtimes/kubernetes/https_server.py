"""A server that speaks HTTPS, as the API server does; the client of a service account accepts nothing else."""

from __future__ import annotations

import functools
import ipaddress
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp.test_utils
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class HttpsServer(aiohttp.test_utils.RawTestServer):
    """kmock's server, with TLS."""

    def __init__(self, *arguments: Any, context: ssl.SSLContext, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._context = context

    async def start_server(self, *arguments: Any, **named: Any) -> None:
        await super().start_server(*arguments, ssl=self._context, **named)

    async def close(self) -> None:
        """Close without TLS's goodbye: a client that stays open would never answer it."""
        for connection in self.handler.connections if self.started and not self.closed else ():
            connection.transport.abort()
        await super().close()


def https_server_factory(authority: Path) -> Callable[..., HttpsServer]:
    """Make a server with a self-signed certificate.

    Args:
        authority: The file for the certificate, which a client must trust.
    """
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )

    pem = certificate.public_bytes(serialization.Encoding.PEM)
    authority.write_bytes(pem)
    key_and_certificate = authority.with_name("server.pem")
    key_format = serialization.PrivateFormat.PKCS8
    key_and_certificate.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, key_format, serialization.NoEncryption()) + pem
    )

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(key_and_certificate)
    return functools.partial(HttpsServer, context=context)
