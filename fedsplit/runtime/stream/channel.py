"""What both ends tell gRPC: names, message lengths, keep-alive, certificates."""

from __future__ import annotations

from typing import Any, Literal

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedsplit.runtime.stream.packet import MOST_CHUNK_BYTES
from fedsplit.types import FedsplitError

SERVICE = "fedsplit.Body"
METHOD = "Session"
KEEPALIVE_S = 20

_BOTH = [
    ("grpc.max_send_message_length", MOST_CHUNK_BYTES),
    ("grpc.max_receive_message_length", MOST_CHUNK_BYTES),
    # A peer that does not answer a ping within the second number is gone.
    ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
    ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_S),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *_BOTH,
    ("grpc.so_reuseport", 0),  # else a second server on the port would start, and take half of the clients
    ("grpc.http2.min_ping_interval_without_data_ms", 500 * KEEPALIVE_S),
    ("grpc.server_handshake_timeout_ms", 10_000),
]
CLIENT_OPTIONS = [
    *_BOTH,
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel does not wait for the pauses of an old one
]


def credentials(tls: tuple[bytes, bytes]) -> Any:
    """Credentials of a server for gRPC, from a certificate chain and its private key (PEM).

    Raises:
        FedsplitError: one of them is unreadable, or they do not belong together.
    """
    chain, key = tls
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, IndexError):
        raise FedsplitError(
            "The server's certificate or its key is not readable: give PEM, without password."
        ) from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise FedsplitError("The server's private key does not belong to its certificate (the first of the chain).")
    return grpc.ssl_server_credentials([(key, chain)])


def connect(address: str, root_certificates: bytes | Literal["plaintext"] | None, name_override: str) -> Any:
    """A channel; nothing is sent before it is used.

    Raises:
        FedsplitError: the root certificates are unreadable.
    """
    if root_certificates == "plaintext":
        return grpc.insecure_channel(address, options=CLIENT_OPTIONS)
    try:
        x509.load_pem_x509_certificates(root_certificates or b"")
    except ValueError:
        if root_certificates is not None:
            raise FedsplitError("The root certificates are not readable: give PEM.") from None
    options = [*CLIENT_OPTIONS, *([("grpc.ssl_target_name_override", name_override)] if name_override else [])]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates), options=options)
