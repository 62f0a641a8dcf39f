"""A server that echoes, its clients, certificates made on the spot, and a network that drops connections."""

from __future__ import annotations

import datetime
import ipaddress
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.runtime.stream.client import StreamClient
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Kind, fingerprint
from fedsplit.runtime.stream.server import StreamServer, Ticket

CODECS = fingerprint("activations-up=int8")
LIMITS = Limits(idle_s=20.0, session_s=60.0, packet_bytes=16 << 20)


class Echo:
    """Gives the payload back and counts; remembers in which thread it was called."""

    def __init__(self, trouble: Callable[[bytes], None] = lambda payload: None) -> None:
        self.trouble = trouble
        self.values: list[int] = []
        self.closed = 0
        self.threads = {threading.get_ident()}

    def handle(self, kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
        self.threads.add(threading.get_ident())
        self.trouble(payload)
        self.values.append(value)
        return (value + 1) % 2**64, payload

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1


@dataclass
class Site:
    """A running server and what is needed to be its client."""

    server: StreamServer
    port: int
    roots: bytes | Literal["plaintext"]
    handlers: list[Echo] = field(default_factory=list)

    def ticket(self, key: Ed25519PrivateKey, expires_in_s: float = 60.0, **others: int) -> Ticket:
        public = key.public_key().public_bytes_raw()
        return Ticket(secrets.token_bytes(32), others.get("node", 1), 2, 3, public, time.monotonic() + expires_in_s)

    def expect(self, ticket: Ticket, trouble: Callable[[bytes], None] = lambda payload: None) -> None:
        def make() -> Echo:
            self.handlers.append(Echo(trouble))
            return self.handlers[-1]

        self.server.expect(ticket, make, CODECS)

    def client(self, ticket: Ticket, key: Ed25519PrivateKey, port: int = 0, **others: Any) -> StreamClient:
        given: dict[str, Any] = {
            "root_certificates": self.roots, "codecs": CODECS, "limits": LIMITS, "patience_s": 3.0, **others
        }  # fmt: skip
        return StreamClient(f"127.0.0.1:{port or self.port}", ticket.token, key, **given)

    def join(self, **others: Any) -> tuple[StreamClient, Ticket]:
        """A client of a session of its own."""
        key = Ed25519PrivateKey.generate()
        ticket = self.ticket(key)
        self.expect(ticket, **others)
        return self.client(ticket, key), ticket


@contextmanager
def site(limits: Limits = LIMITS, tls: tuple[bytes, bytes, bytes] | None = None) -> Iterator[Site]:
    """A server on a free port; `tls` is what `certificates` gives."""
    server = StreamServer("127.0.0.1:0", limits, tls[1:] if tls else None)
    port = server.start()
    try:
        yield Site(server, port, tls[0] if tls else "plaintext")
    finally:
        server.stop()


def certificates(name: str = "127.0.0.1") -> tuple[bytes, bytes, bytes]:
    """Root certificate, server's certificate chain and its private key, as PEM."""
    today = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        alternative = x509.DNSName(name)

    def certificate(subject: str, public: Any, extensions: list[x509.ExtensionType]) -> bytes:
        builder = x509.CertificateBuilder().serial_number(x509.random_serial_number()).public_key(public)
        builder = builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        builder = builder.issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]))
        builder = builder.not_valid_before(today - datetime.timedelta(days=1))
        builder = builder.not_valid_after(today + datetime.timedelta(days=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root = certificate("root", root_key.public_key(), [x509.BasicConstraints(True, None)])
    chain = certificate("server", key.public_key(), [x509.SubjectAlternativeName([alternative])])
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return root, chain, key.private_bytes(*form)


class Network:
    """A TCP proxy to `port` that drops its connections when told, or after so many bytes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self.cut_after: list[int] = []
        """For the next connections in turn: bytes in both directions after which it is dropped."""
        self._live: list[socket.socket] = []
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self) -> None:
        """Drop all connections now."""
        live, self._live = self._live, []
        for end in live:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while self._open:
            try:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self.connections += 1
            self._live += [near, far]
            left = self.cut_after.pop(0) if self.cut_after else 1 << 62
            threading.Thread(target=self._carry, args=(near, far, left), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket, left: int) -> None:
        with suppress(OSError), near, far:
            while left > 0:
                for end in select.select([near, far], [], [])[0]:
                    data = end.recv(min(65536, left))
                    if not data:
                        return
                    (far if end is near else near).sendall(data)
                    left -= len(data)


@contextmanager
def network(port: int) -> Iterator[Network]:
    """A `Network` for a while."""
    between = Network(port)
    try:
        yield between
    finally:
        between.close()


def until(true: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Wait for something that other threads do."""
    end_s = time.monotonic() + within_s
    while not true() and time.monotonic() < end_s:
        time.sleep(0.01)
    return true()
