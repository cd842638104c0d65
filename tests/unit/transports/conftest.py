"""Run each test on both event loops, and some tests with TLS as well."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Awaitable
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from relay.transports.socket.reaper import Reaper
from tests.unit.transports.serving import Run


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on a new event loop of this kind; fail if the loop reports an error."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    reported: list[object] = []

    def go(main: Awaitable[None]) -> None:
        async def limited() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: reported.append(what))
            async with asyncio.timeout(30):
                await main

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(limited())
        assert not reported

    return go


@pytest.fixture
def reaper() -> Reaper:
    return Reaper(grace_s=0.3)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return TLS contexts for a server and a client with a certificate made for this run."""
    folder: Path = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "both.pem").write_bytes(pem + secret)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=pem.decode())
