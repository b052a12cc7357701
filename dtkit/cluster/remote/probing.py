"""How well one host reaches another: answered by a socket that is open for a moment only."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
from typing import Any

__all__ = ["listen", "measure"]

_TOKEN_BYTES = 16
_OPEN_S = 30.0
_CONNECT_TIMEOUT_S = 3.0
_NUM_PINGS = 20
_CHUNK = bytes(1 << 20)

# Any, below: JSON.


def listen(address: str) -> dict[str, Any]:
    """Let other hosts measure the way here for half a minute; return the port and a token.

    Who connects must know the token; the port closes by itself.
    """
    server = socket.create_server((address, 0))
    token = secrets.token_hex(_TOKEN_BYTES)
    threading.Thread(target=_serve, args=(server, token), name="dtkit-probe", daemon=True).start()
    return {"address": address, "port": server.getsockname()[1], "token": token}


def measure(address: str, port: int, token: str, for_s: float) -> dict[str, Any]:
    """Measure the way to a host that listens.

    Args:
        address: its own.
        port: where it listens.
        token: what it gave out.
        for_s: how long to send at full speed; 0: only the latency.

    Returns:
        latency_ms (the median of a few round trips) and mbit_per_s; or error.
    """
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(token.encode())
            times = []
            for _ in range(_NUM_PINGS):
                begun_s = time.perf_counter()
                peer.sendall(b".")
                if peer.recv(1) != b".":
                    return {"error": "the connection was closed"}
                times.append(time.perf_counter() - begun_s)
            found: dict[str, Any] = {"latency_ms": 1000 * sorted(times)[_NUM_PINGS // 2]}
            if for_s:
                found["mbit_per_s"] = _rate(peer, for_s) / 1e6
            return found
    except OSError as error:
        return {"error": str(error)}


def _rate(peer: socket.socket, for_s: float) -> float:
    """Return how many bits arrive in a second."""
    peer.settimeout(_OPEN_S)
    begun_s = time.perf_counter()
    while time.perf_counter() < begun_s + for_s:
        peer.sendall(_CHUNK)
    peer.shutdown(socket.SHUT_WR)
    num_bytes = int.from_bytes(_exactly(peer, 8))
    return 8 * num_bytes / (time.perf_counter() - begun_s)


def _serve(server: socket.socket, token: str) -> None:
    deadline = time.monotonic() + _OPEN_S
    with server:
        while (left_s := deadline - time.monotonic()) > 0:
            server.settimeout(left_s)
            with contextlib.suppress(OSError):  # the time is over, or who came has gone
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(_OPEN_S)
                    _answer(peer, token)


def _answer(peer: socket.socket, token: str) -> None:
    if not hmac.compare_digest(_exactly(peer, len(token)), token.encode()):
        return
    for _ in range(_NUM_PINGS):
        peer.sendall(_exactly(peer, 1))
    num_bytes = 0
    while chunk := peer.recv(len(_CHUNK)):
        num_bytes += len(chunk)
    peer.sendall(num_bytes.to_bytes(8))


def _exactly(peer: socket.socket, num: int) -> bytes:
    data = b""
    while len(data) < num:
        more = peer.recv(num - len(data))
        if not more:
            raise ConnectionError("closed early")  # noqa: EM101, TRY003  seen by nobody
        data += more
    return data
