"""Objects as a small pickle and the large buffers beside it, which are sent from where they lie.

Pickle protocol 5 does this for NumPy arrays; torch's tensors copy themselves
into the pickle, so they are taken apart here. Used on both sides of a transfer.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

__all__ = ["blank", "outside", "pack", "receive", "receive_into", "same", "send", "unpack"]

# Any, throughout: the user's own objects.

_CHUNK = 1 << 22


def pack(
    value: Any, reduce: Callable[[Any], Any] = lambda _obj: None
) -> tuple[bytes, list[memoryview]]:
    """Return an object's pickle and its buffers, as views of the object's own memory.

    Tensors on a GPU, and those that do not lie in memory one after the other,
    are copied to the CPU first. Classes defined in cells go along by value.

    Args:
        value: the object.
        reduce: called with each object in it that is not of a built-in type; may return
            what `__reduce__` does, such as `outside(number)`, or None to leave it to pickle.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _pickler(file, buffers.append, reduce).dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def unpack(head: bytes, buffers: Sequence[Any], others: Sequence[Any] = ()) -> Any:
    """Return the object; its tensors use the buffers' memory.

    Args:
        head: the pickle.
        buffers: as `pack` returned them.
        others: what stands where `outside(number)` was put, by number.
    """
    return _Unpickler(io.BytesIO(head), buffers=buffers, others=others).load()


def outside(number: int) -> Any:
    """Return what `reduce` must return for an object that comes another way."""
    return _outside, (number,)


def blank(kind: type) -> Any:
    """Return an object of a class whose state is to come, for `reduce` to name."""
    return object.__new__(kind)


def same(value: Any) -> Any:
    """Return it, for `reduce` to name: an object that travels as another one."""
    return value


def _outside(number: int) -> Any:
    msg = f"object {number} comes another way: it is unpack's"
    raise TypeError(msg)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, buffers: Sequence[Any], others: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._others = others

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _outside.__name__):
            return self._others.__getitem__
        return super().find_class(module, name)


def send(connection: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Send buffers one after the other."""
    for buffer in buffers:
        connection.sendall(buffer)


def receive(connection: socket.socket, sizes: Sequence[int]) -> list[bytearray]:
    """Receive buffers of these sizes.

    Raises:
        ConnectionError: the other side ended before the last byte.
    """
    buffers = []
    for size in sizes:
        buffer = _new(size)
        receive_into(connection, memoryview(buffer))
        buffers.append(buffer)
    return buffers


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fill memory with what comes.

    Raises:
        ConnectionError: the other side ended before the last byte.
    """
    while view:
        num = connection.recv_into(view[:_CHUNK])
        if not num:
            msg = "the other side ended in the middle of a transfer"
            raise ConnectionError(msg)
        view = view[num:]


def _new(size: int) -> Any:
    import numpy as np

    return np.empty(size, dtype=np.uint8)  # a bytearray would be filled with zeros first


def _pickler(file: io.BytesIO, take: Any, reduce: Callable[[Any], Any]) -> Any:
    import cloudpickle
    import torch

    storages: dict[int, _Storage] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
        def reducer_override(self, obj: Any) -> Any:
            given = reduce(obj)
            if given is not None:
                return given
            if type(obj) is not torch.Tensor or not _is_plain(obj):
                return super().reducer_override(obj)
            whole = obj.detach().cpu()
            storage = whole.untyped_storage()
            # One object for each storage, so that the pickle has it once and tied weights stay so.
            flat = storages.setdefault(storage.data_ptr(), _Storage(storage))
            place = (whole.storage_offset(), tuple(whole.shape), whole.stride())
            return _tensor, (flat, whole.dtype, place, obj.requires_grad)

    return Pickler(file, protocol=5, buffer_callback=take)


class _Storage:
    """The bytes that tensors lie in."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __reduce_ex__(self, _protocol: Any) -> Any:
        import torch

        flat = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        return _bytes, (pickle.PickleBuffer(flat.numpy().data),)


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _bytes(buffer: Any) -> Any:
    import torch

    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0)


def _tensor(flat: Any, dtype: Any, place: Any, requires_grad: bool) -> Any:  # noqa: FBT001
    import torch

    tensor = torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), *place)
    return tensor.requires_grad_(requires_grad)
