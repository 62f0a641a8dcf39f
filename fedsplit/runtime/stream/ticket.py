"""Who may open a session: a token that one node alone can use."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TOKEN_BYTES = 32
CHALLENGE_BYTES = 32
PROOF_BYTES = TOKEN_BYTES + 64
"""Payload of OPEN: the token and an Ed25519 signature."""


@dataclass(frozen=True)
class Ticket:
    """What the server knows of a session before it is opened.

    `token` (32 random bytes, `secrets`) opens it for this node, client and round until `expires_s`
    (`time.monotonic`), together with a signature by the private key of `public_key` (Ed25519, 32 bytes raw).
    """

    token: bytes
    node: int
    client: int
    round: int
    public_key: bytes
    expires_s: float


def prove(token: bytes, key: Ed25519PrivateKey, challenge: bytes) -> bytes:
    """The payload of OPEN that answers the server's `challenge`."""
    return token + key.sign(_statement(challenge, token))


def proves(payload: bytes, ticket: Ticket, challenge: bytes, now_s: float) -> bool:
    """Whether the payload of an OPEN holds the ticket's token, in time, signed by the ticket's node."""
    token, signature = payload[:TOKEN_BYTES], payload[TOKEN_BYTES:]
    try:
        Ed25519PublicKey.from_public_bytes(ticket.public_key).verify(signature, _statement(challenge, token))
    except (InvalidSignature, ValueError):
        return False
    return hmac.compare_digest(token, ticket.token) and now_s < ticket.expires_s


def _statement(challenge: bytes, token: bytes) -> bytes:
    return b"fedsplit stream 1" + challenge + token
