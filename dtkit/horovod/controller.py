"""Controller: a rank's own end of the negotiation, and the handles of what it has submitted."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from dtkit.horovod.errors import HorovodInternalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtkit.horovod.wire import Channel, Message

__all__ = ["Collective", "Controller", "Handle"]

_CYCLE_S = 1e-3
"""Nothing is done before: Horovod's cycle, in which a second tensor of a name is an error, and
`hvd.poll` is False. What is small is done at once where the others wait for this rank."""
_MAX_RESERVED = 64
_SILENT_S = 0.5
"""A rank that has waited so long says so: if all do, what they wait for never comes."""


class Collective(Protocol):
    """What is done once all ranks are ready."""

    meta: Message
    extra: Any
    payload: memoryview | None
    """What this rank contributes, if it travels along with the submission."""

    def prepare(self, eager_bytes: int) -> None:
        """Get ready to be launched by another thread than the one that submits.

        Args:
            eager_bytes: up to so many, that rank 0 gets in all, may be its payload.
        """

    def launch(self, answer: Message) -> None:
        """Start, and do not wait; on whichever thread, in the same order on all ranks."""

    def is_done(self) -> bool:
        """Whether `finish` would not wait; called after `launch`."""

    def finish(self) -> Any:
        """Wait for the end and return the result."""


class Handle:
    """A collective under way; `hvd.synchronize` waits for it."""

    def __init__(
        self, controller: Controller, key: tuple[int, str], collective: Collective
    ) -> None:
        self._controller = controller
        self._key = key
        self._collective: Collective | None = collective
        self._launched = threading.Event()
        self._taking = threading.Lock()
        """Held while the result is made, which is done once."""
        self.submitted_s: float = time.monotonic()
        self._error: BaseException | None = None
        self._result: Any = None

    @property
    def name(self) -> str:
        """The name that was negotiated."""
        return self._key[1]

    def launch(self, answer: Message) -> None:
        """Start the collective, or take the error that came instead."""
        try:
            if "error" in answer:
                self._error = HorovodInternalError(f"{self.name}: {answer['error']}")
            elif self._collective is not None:
                self._collective.launch(answer)
        except Exception as error:  # noqa: BLE001  raised where the result is asked for
            self._error = error
        finally:
            self._launched.set()

    def fail(self, error: BaseException) -> None:
        """End the wait with an error."""
        self._error = error
        self._launched.set()

    def is_done(self) -> bool:
        """Return whether `wait` would return at once; False until the cycle ends."""
        if not self._launched.is_set():
            return False
        collective = self._collective
        if collective is None:
            return True
        is_over = time.monotonic() >= self.submitted_s + _CYCLE_S
        return is_over and (self._error is not None or collective.is_done())

    def wait(self) -> Any:
        """Return the result, once it is there; the same again when asked again.

        Raises:
            HorovodInternalError: it failed, here or on another rank.
        """
        try:
            if not self._launched.wait(_SILENT_S):
                self._controller.tell({"do": "wait", "set": self._key[0], "name": self._key[1]})
                self._launched.wait()
        except BaseException:  # an interrupt: the others may be at another place by now
            if not self._launched.is_set():
                self._controller.tell({"do": "break"})
            raise
        with self._taking:
            self._take()
        self._controller.forget(self._key, self)
        if self._error is not None:
            raise self._error
        return self._result

    def _take(self) -> None:
        if self._error is not None or self._collective is None:
            return
        try:
            self._result = self._collective.finish()
            self._controller.finished(self.name, self._collective.meta)
        except RuntimeError as error:
            self._error = HorovodInternalError(f"{self.name}: {error}")
            self._error.__cause__ = error
        self._collective = None


class Controller:
    """Submits collectives and starts them when they are agreed on.

    Attributes:
        finished: called with name and meta of each collective whose result was taken.

    Args:
        channel: reaches the coordinator.
        stand_in: returns the collective of zeros with which a rank that has
            joined takes part in another's.
        eager_bytes: what may travel along with what is submitted; see `Collective.prepare`.
    """

    def __init__(
        self, channel: Channel, stand_in: Callable[[Message], Collective], eager_bytes: int
    ) -> None:
        self._channel = channel
        self._eager_bytes = eager_bytes
        self._stand_in = stand_in
        self._handles: dict[tuple[int, str], Handle] = {}
        self._reserved: dict[tuple[int, str], Handle] = {}
        self._lock = threading.Lock()
        self.finished: Callable[[str, Message], None] = lambda _name, _meta: None
        self._broken = ""
        """Why nothing can be submitted any more."""
        reason = "rank 0 is gone: its process ended, or Horovod was shut down there"
        channel.open(self._start, lambda: self.fail(reason))

    def submit(self, process_set: int, name: str, collective: Collective) -> Handle:
        """Say that this rank is ready for a collective.

        Raises:
            ValueError: one of this name is under way.
            HorovodInternalError: the connection is broken.
        """
        key = (process_set, name)
        collective.prepare(self._eager_bytes)
        handle = Handle(self, key, collective)
        with self._lock:
            if self._broken:
                msg = f"{self._broken}; call hvd.init() again"
                raise HorovodInternalError(msg)
            if key in self._handles or self._is_reserved(key):
                msg = f"a tensor named {name!r} is being processed: give this one another name"
                raise ValueError(msg)
            self._handles[key] = self._reserved[key] = handle
            if len(self._reserved) > _MAX_RESERVED:
                self._reserved = {k: h for k, h in self._reserved.items() if self._is_reserved(k)}
        message = {
            "do": "submit", "set": process_set, "name": name,
            "meta": collective.meta, "extra": collective.extra,
        }  # fmt: skip
        if collective.payload is not None:
            message["payload"] = collective.payload
        self.tell(message)
        return handle

    def tell(self, message: Message) -> None:
        """Send the coordinator a message; if it is gone, `fail` has said so or will."""
        with contextlib.suppress(OSError):
            self._channel.send(message)

    def forget(self, key: tuple[int, str], handle: Handle) -> None:
        """Let a handle whose result was taken go, and its name be used again."""
        with self._lock:
            if self._reserved.get(key) is handle:
                del self._reserved[key]

    def fail(self, reason: str) -> None:
        """Fail everything that is under way, and all that is submitted from now on."""
        with self._lock:
            self._broken = self._broken or reason
            handles, self._handles = list(self._handles.values()), {}
        for handle in handles:
            handle.fail(HorovodInternalError(f"{handle.name}: {self._broken}"))
        self._channel.give_up()

    @property
    def is_broken(self) -> bool:
        """Whether everything has failed, and nothing can be submitted any more."""
        return bool(self._broken)

    def close(self) -> None:
        """Leave; others that need this rank get an error."""
        self.tell({"do": "leave"})
        self.fail("Horovod was shut down")
        self._channel.close()

    def _is_reserved(self, key: tuple[int, str]) -> bool:
        """Whether a tensor of this name may still be under way."""
        handle = self._reserved.get(key)
        return handle is not None and not handle.is_done()

    def _start(self, answer: Message) -> None:
        if "broken" in answer:
            self.fail(answer["broken"])
            return
        with self._lock:
            handle = self._handles.pop((answer["set"], answer["name"]), None)
        if handle is not None:
            handle.launch(answer)
        elif "error" not in answer and "payload" not in answer:  # this rank has joined
            # The others see it fail, and say so; ValueError: this rank has shut down meanwhile.
            with contextlib.suppress(RuntimeError, ValueError):
                self._stand_in(answer).launch(answer)
