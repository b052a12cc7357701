"""Mesh: a connection from each rank to each other, apart from the process group.

Collectives end for all ranks when one dies; what is asked here is asked of one rank, and
fails alone. A rank that dies is seen at once: its connections end. Messages are a line of
JSON, and perhaps a vector; nothing is unpickled. Who connects must know a secret that the
ranks have shared over their process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist

from dtkit.engine.process.group import own_address

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FreedError", "Mesh", "Message", "PeerLostError", "Reply"]

Message = dict[str, Any]  # Any: JSON
Reply = tuple[Message, torch.Tensor | None]

_JOIN_TIMEOUT_S = 60.0
_meshes: WeakSet[Mesh] = WeakSet()
"""What a forked child closes: it would hide the death of its parent."""


class FreedError(RuntimeError):
    """This rank was freed from waiting for others."""

    def __init__(self) -> None:
        super().__init__("freed while it waited for another rank")


class PeerLostError(ConnectionError):
    """A rank has ended, or has closed its end."""


class Mesh:
    """This rank's connections to the others. Making it is a collective of the group.

    Args:
        group: the ranks; here they are known by their number in it.
        answer: called on a thread with a rank, its message and its vector; returns the reply.
        on_lost: called on a thread with the number of a rank that is gone.

    Attributes:
        sent_bytes: of the vectors that this rank has sent, as it asked and as it answered.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        answer: Callable[[int, Message, torch.Tensor | None], Reply],
        on_lost: Callable[[int], None],
    ) -> None:
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self._answer, self._on_lost = answer, on_lost
        self._is_closed = self._is_cut = False
        self.sent_bytes: int = 0
        self._counting = threading.Lock()
        self._served: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._all_here = threading.Event()
        # Any, below: the addresses that the ranks tell each other.
        listener = Listener((own_address(), 0), backlog=self.size, authkey=secrets.token_bytes(32))
        mine: Any = (listener.address, listener._authkey)  # type: ignore[attr-defined]  # noqa: SLF001
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=group)
        self._start(self._accept, listener)
        self._peers: dict[int, Connection] = {}
        try:
            self._connect(found)
        except BaseException:
            self._is_closed = True
            with contextlib.suppress(OSError):  # it may have ended
                Client(mine[0], authkey=mine[1]).close()  # the thread that accepts looks up
            self.close()
            raise
        _close_in_children()
        _meshes.add(self)

    def _connect(self, found: list[Any]) -> None:
        """Connect to the others at their addresses with their keys, and wait for them."""
        for number, (address, key) in enumerate(found):
            if number != self.rank:
                self._peers[number] = Client(address, authkey=key)
                _send_at_once(self._peers[number])
                self._peers[number].send_bytes(json.dumps(self.rank).encode())
        if not self._all_here.wait(_JOIN_TIMEOUT_S):
            msg = f"not all ranks have connected within {_JOIN_TIMEOUT_S:g} s"
            raise TimeoutError(msg)

    def ask(
        self,
        number: int,
        message: Message,
        vector: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
    ) -> Message:
        """Ask a rank something, and wait for its reply.

        Args:
            number: which rank.
            message: what is asked.
            vector: goes along; on the CPU, contiguous.
            into: takes the vector of the reply, if there is one.

        Raises:
            PeerLostError: the rank is gone.
            FreedError: this rank was freed from waiting.
            RuntimeError: the rank is there, and cannot answer.
        """
        connection = self._peers[number]
        try:
            self._send(connection, message, vector)
            reply: Message = json.loads(connection.recv_bytes())
            if reply.pop("num_bytes", 0):
                assert into is not None  # noqa: S101  for the type checker: who asks knows
                connection.recv_bytes_into(_bytes(into))
        except (EOFError, OSError) as error:
            if self._is_cut:
                raise FreedError from None
            msg = f"rank {number} is gone"
            raise PeerLostError(msg) from error
        if "error" in reply:
            msg = f"rank {number} cannot answer {message['ask']!r}: {reply['error']}"
            raise RuntimeError(msg)
        return reply

    def cut(self) -> None:
        """Free whoever waits here for another rank; call it from any thread."""
        self._is_cut = True
        self._shut()

    def close(self) -> None:
        """Close every connection; the others see it as the end of this rank."""
        self._is_closed = True
        _meshes.discard(self)
        self._shut()
        for thread in self._threads:
            thread.join()
        for connection in self._peers.values():
            connection.close()

    def close_in_child(self) -> None:
        """Close the descriptors, in a forked child."""
        for connection in [*self._peers.values(), *self._served]:
            connection.close()

    def _shut(self) -> None:
        for connection in [*self._peers.values(), *self._served]:
            with contextlib.suppress(OSError):  # closed already
                # A read on another thread ends only if the connection does.
                twin = socket.socket(fileno=os.dup(connection.fileno()))
                twin.shutdown(socket.SHUT_RDWR)
                twin.close()

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, name="dtkit-mesh", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: Listener) -> None:
        with listener:
            while len(self._served) < self.size - 1 and not self._is_closed:
                # Not of one of us: whoever finds the port, and does not know the secret.
                with contextlib.suppress(OSError, EOFError, AuthenticationError):
                    connection = listener.accept()
                    _send_at_once(connection)
                    number = json.loads(connection.recv_bytes())
                    self._served.append(connection)
                    self._start(self._serve, number, connection)
        self._all_here.set()

    def _serve(self, number: int, connection: Connection) -> None:
        scratch = torch.empty(0, dtype=torch.uint8)
        with connection:
            try:
                while True:
                    message: Message = json.loads(connection.recv_bytes())
                    vector = None
                    num_bytes = message.pop("num_bytes", 0)
                    if num_bytes:
                        if scratch.numel() != num_bytes:
                            scratch = torch.empty(num_bytes, dtype=torch.uint8)
                        connection.recv_bytes_into(_bytes(scratch))
                        vector = scratch.view(getattr(torch, message.pop("dtype")))
                    self._send(connection, *self._reply(number, message, vector))
            except (EOFError, OSError, FreedError):
                if not self._is_closed:
                    self._on_lost(number)

    def _send(self, connection: Connection, message: Message, vector: torch.Tensor | None) -> None:
        if vector is not None and not vector.numel():
            vector = None
        if vector is None:
            connection.send_bytes(json.dumps(message).encode())
            return
        num_bytes = vector.numel() * vector.element_size()
        kind = str(vector.dtype).removeprefix("torch.")
        message = {**message, "num_bytes": num_bytes, "dtype": kind}
        connection.send_bytes(json.dumps(message).encode())
        connection.send_bytes(_bytes(vector))
        with self._counting:
            self.sent_bytes += num_bytes

    def _reply(self, number: int, message: Message, vector: torch.Tensor | None) -> Reply:
        try:
            return self._answer(number, message, vector)
        except FreedError:
            raise
        except Exception as error:  # noqa: BLE001  who has asked raises it
            return {"error": f"{type(error).__name__}: {error}"}, None


def _send_at_once(connection: Connection) -> None:
    """Let no small message wait for an acknowledgement: that takes 40 ms."""
    twin = socket.socket(fileno=os.dup(connection.fileno()))
    twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    twin.close()


def _bytes(vector: torch.Tensor) -> memoryview:
    return memoryview(vector.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is one


def _forget_in_child() -> None:
    for mesh in list(_meshes):
        mesh.close_in_child()


def _close_in_children() -> None:
    if not getattr(_close_in_children, "is_done", False):
        os.register_at_fork(after_in_child=_forget_in_child)
        _close_in_children.is_done = True  # type: ignore[attr-defined]
