"""A TCP proxy that cuts connections: a network that fails in the middle of things."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Cutter:
    """Forwards a port of this host to `target`, and cuts connection number i after `after[i]` bytes up."""

    def __init__(self, target: str, after: list[int]) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._after = after
        self.cuts = self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                left = self._after[self.connections] if self.connections < len(self._after) else None
                self.connections += 1
                far = socket.create_connection(self._target)
                threading.Thread(target=self._pump, args=(near, far, left), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if left is not None:
                    left -= len(data)
                    if left < 0:
                        self.cuts += 1
                        break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
