"""What the stream to the body costs: its echo against a bare gRPC stream of the same bytes.

    python simulations/link.py [--quick]

Each server is a process of its own, as in life; the bare one gives back every message as it came, in one piece.
The two are measured in turns, so that other work on the machine meets both alike: `ratio` is the median, over
these pairs, of the time that ours takes over that of the bare stream, `ratio_low` and `ratio_high` its quartiles.
`round_trips_per_s` is that of all sessions together, and `mb_per_s` (10**6 bytes) counts both directions. Prints one
line of JSON last.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import multiprocessing
import queue
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.runtime.stream.client import StreamClient
from fedsplit.runtime.stream.limits import Limits
from fedsplit.runtime.stream.packet import Kind
from fedsplit.runtime.stream.server import StreamServer, Ticket

SIZES = {"4 KB": 4096, "1 MB": 10**6, "10 MB": 10**7}
EACH = {"4 KB": 100, "1 MB": 10, "10 MB": 3}
"""Round trips of a session in one measurement; a third of them when it must be quick."""
SESSIONS = (1, 8)
BARE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
LIMITS = Limits(sessions=16, session_s=36000, idle_s=3600)
Exchange = Callable[[bytes], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer measurements")
    parser.add_argument("--pairs", type=int, default=0, help="measurements of each of the two; 0 chooses")
    parser.add_argument("--chunk-bytes", type=int, default=LIMITS.chunk_bytes, help="what a gRPC message of ours holds")
    options = parser.parse_args()
    pairs, share = options.pairs or (9 if options.quick else 41), 3 if options.quick else 1
    rows = []
    for secure in (False, True):
        with ends(secure, options.chunk_bytes) as (ours, bare):
            for sessions in SESSIONS:
                for name in SIZES:
                    row = compare(name, ours[:sessions], bare[:sessions], pairs, EACH[name] // share)
                    rows.append({"size": name, "tls": secure, "sessions": sessions, **row})
                    print(
                        f"{name:>6} {'TLS' if secure else '   '} {sessions} sessions: "
                        f"{row['round_trips_per_s']:8.1f} round trips/s, {row['mb_per_s']:7.1f} MB/s, "
                        f"bare {row['bare_round_trips_per_s']:8.1f}, ratio {row['ratio']:.3f} "
                        f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
                        flush=True,
                    )
    print(json.dumps({"pairs": pairs, "rows": rows}))


def compare(name: str, ours: list[Exchange], bare: list[Exchange], pairs: int, count: int) -> dict[str, float]:
    """Both in turns, the first measurement of each left out."""
    payload = secrets.token_bytes(SIZES[name])
    with ThreadPoolExecutor(len(ours)) as pool:
        times = [[seconds(pool, one, payload, count) for one in (ours, bare)] for _ in range(pairs + 1)][1:]
    ratios = [mine / other for mine, other in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    total = count * len(ours)
    mine, other = (total / statistics.median(pair[which] for pair in times) for which in (0, 1))
    moved = 2 * SIZES[name] / 1e6
    return {
        "round_trips_per_s": round(mine, 1),
        "mb_per_s": round(mine * moved, 1),
        "bare_round_trips_per_s": round(other, 1),
        "bare_mb_per_s": round(other * moved, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
    }


def seconds(pool: ThreadPoolExecutor, ends: list[Exchange], payload: bytes, count: int) -> float:
    """Wall time of `count` round trips in every session at once."""

    def work(exchange: Exchange) -> None:
        for _ in range(count):
            exchange(payload)

    begun = time.perf_counter()
    list(pool.map(work, ends))
    return time.perf_counter() - begun


@contextmanager
def ends(secure: bool, chunk_bytes: int) -> Iterator[tuple[list[Exchange], list[Exchange]]]:
    """The clients' ends of both kinds, their servers running."""
    root, tls = certificates() if secure else (b"", None)
    key = Ed25519PrivateKey.generate()
    tokens = [secrets.token_bytes(32) for _ in range(max(SESSIONS))]
    limits = Limits(LIMITS.sessions, LIMITS.packet_bytes, chunk_bytes, LIMITS.idle_s, LIMITS.session_s)
    with ExitStack() as stack:
        port = stack.enter_context(process(serve, limits, tls, tokens, key.public_key().public_bytes_raw()))
        other = stack.enter_context(process(serve_bare, tls))
        ours, bare = [], []
        for token in tokens:
            client = StreamClient(
                f"127.0.0.1:{port}", token, key, root_certificates=root or "plaintext", codecs=1, limits=limits
            )
            stack.callback(client.close)
            ours.append(lambda payload, client=client: same(payload, client.exchange(Kind.FORWARD, 1, payload)[1]))
            bare.append(bare_end(stack, f"127.0.0.1:{other}", root))
        yield ours, bare


def bare_end(stack: ExitStack, address: str, root: bytes) -> Exchange:
    """A bare stream over a channel of its own."""
    options = [*BARE, ("grpc.use_local_subchannel_pool", 1)]
    if root:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root), options=options)
    else:
        channel = grpc.insecure_channel(address, options=options)
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    replies = channel.stream_stream("/bare/Echo")(iter(messages.get, None))
    stack.callback(channel.close)
    stack.callback(messages.put, None)

    def exchange(payload: bytes) -> None:
        messages.put(payload)
        same(payload, next(replies))

    return exchange


def same(sent: bytes, received: bytes) -> None:
    """Lengths and ends are compared: the bytes would cost both alike."""
    assert len(sent) == len(received) and sent[-64:] == received[-64:]


class Echo:
    """The body that only gives back."""

    def handle(self, kind: Kind, value: int, payload: bytes) -> tuple[int, bytes]:
        """What came."""
        return value, payload

    def close(self) -> None:
        """Nothing to forget."""


def serve(pipe: Connection, limits: Limits, tls: tuple[bytes, bytes] | None, tokens: list[bytes], key: bytes) -> None:
    """Our server, until the pipe says enough."""
    server = StreamServer("127.0.0.1:0", limits, tls)
    port = server.start()
    for number, token in enumerate(tokens):
        server.expect(Ticket(token, number, number, 1, key, time.monotonic() + limits.session_s), Echo, 1)
    pipe.send(port)
    wait(pipe)
    server.stop()


def serve_bare(pipe: Connection, tls: tuple[bytes, bytes] | None) -> None:
    """A gRPC stream that gives back, until the pipe says enough."""
    server = grpc.server(ThreadPoolExecutor(16), options=BARE)
    handler = grpc.stream_stream_rpc_method_handler(lambda messages, _context: messages)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Echo": handler}),))
    if tls:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(tls[1], tls[0])]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(port)
    wait(pipe)
    server.stop(None).wait()


def wait(pipe: Connection) -> None:
    """Until the other end of the pipe is closed."""
    with suppress(EOFError):
        pipe.recv()


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """A process that serves, and its port."""
    context = multiprocessing.get_context("forkserver")  # what they import is imported once
    here, there = context.Pipe()
    child = context.Process(target=target, args=(there, *arguments), daemon=True)
    child.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()  # ends its `recv`
        child.join(10)
        child.kill()


def certificates() -> tuple[bytes, tuple[bytes, bytes]]:
    """A self-signed certificate of 127.0.0.1: the root, and chain and key of the server."""
    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "link")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(today - datetime.timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.not_valid_after(today + datetime.timedelta(days=2)).add_extension(address, critical=False)
    chain = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return chain, (chain, key.private_bytes(*form))


if __name__ == "__main__":
    main()
