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
    from collections.abc import Sequence

__all__ = ["pack", "receive", "send", "unpack"]

# Any, throughout: the user's own objects.

_CHUNK = 1 << 22


def pack(value: Any) -> tuple[bytes, list[memoryview]]:
    """Return an object's pickle and its buffers, as views of the object's own memory.

    Tensors on a GPU, and those that do not lie in memory one after the other,
    are copied to the CPU first. Classes defined in cells go along by value.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _pickler(file, buffers.append).dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def unpack(head: bytes, buffers: Sequence[Any]) -> Any:
    """Return the object; its tensors use the buffers' memory."""
    return pickle.loads(head, buffers=buffers)  # noqa: S301  of our own engine, authenticated


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
        view = memoryview(buffer)
        while view:
            num = connection.recv_into(view[:_CHUNK])
            if not num:
                msg = "the other side ended in the middle of a transfer"
                raise ConnectionError(msg)
            view = view[num:]
        buffers.append(buffer)
    return buffers


def _new(size: int) -> Any:
    import numpy as np

    return np.empty(size, dtype=np.uint8)  # a bytearray would be filled with zeros first


def _pickler(file: io.BytesIO, take: Any) -> Any:
    import cloudpickle
    import torch

    storages: dict[int, _Storage] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
        def reducer_override(self, obj: Any) -> Any:
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
