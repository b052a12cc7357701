"""A socket of this user's, to which processes of this host send large buffers."""

from __future__ import annotations

import socket
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["bound_s", "serving"]

_SLOWEST = 20e6
"""Bytes a second; a transfer that is slower has come to a stop."""
_STALL_S = 60.0
"""A rank that neither sends nor takes anything for so long is given up."""
_POLL_S = 0.1


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Let processes of this user connect to the yielded path, and serve each in a thread.

    Leaving the context waits for those that are being served, and raises what one failed with.
    """
    errors: list[Exception] = []
    threads: list[threading.Thread] = []
    is_over = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        try:
            with connection:
                serve(connection)
        except Exception as error:  # noqa: BLE001  raised below, where the caller is
            errors.append(error)

    def listen() -> None:
        while not is_over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(_STALL_S)
            threads.append(threading.Thread(target=serve_one, args=(connection,), daemon=True))
            threads[-1].start()

    with (
        tempfile.TemporaryDirectory(prefix="dtkit-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = str(Path(folder) / "socket")
        listener.bind(path)
        listener.listen()
        listener.settimeout(_POLL_S)
        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        try:
            yield path
        finally:
            is_over.set()
            listening.join()
            for thread in threads:
                thread.join()
    if errors:
        raise errors[0]


def bound_s(sizes: Sequence[int]) -> float:
    """Return how long a transfer of these bytes may take."""
    return 60.0 + sum(sizes) / _SLOWEST
