"""What names a rank has, told while it is busy: for completion in the notebook.

Nothing of the user's own runs here, no property and no `__dir__`: this is the thread that Stop
needs as well.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtkit.engine.process.shell import current_shell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtkit.engine.process.agent import Agent

__all__ = ["install"]

# Any, below: the user's own objects.

_GONE = object()


def install(owner: Agent) -> None:
    """Let the agent answer `names`: the names after `path` and a dot, each with its type."""
    owner.on("names", lambda request: {"names": names_after(request["path"])})


def names_after(path: str) -> dict[str, str]:
    """Return the public names in the namespace, or the attributes of an object in it.

    Args:
        path: the object, such as `model.fc`; empty for the namespace itself.
    """
    shell = current_shell()
    namespace = dict(shell.user_ns)
    if not path:
        given = namespace.get("_dtkit_given", {})
        hidden = set(shell.user_ns_hidden) - set(given)
        return _typed((name, namespace[name]) for name in namespace if name not in hidden)
    first, *rest = path.split(".")
    value = namespace.get(first, _GONE)
    for name in rest:
        value = _attribute(value, name)
    if value is _GONE:
        return {}
    return _typed((name, _attribute(value, name)) for name in _attributes(value))


def _typed(pairs: Iterator[tuple[str, Any]]) -> dict[str, str]:
    return {
        name: "" if value is _GONE else type(value).__name__
        for name, value in pairs
        if not name.startswith("_")
    }


def _attributes(value: Any) -> list[str]:
    if isinstance(value, ModuleType):
        return list(vars(value))
    # torch's own are known to compute nothing.
    safe: tuple[Any, ...] = (object.__dir__, nn.Module.__dir__, torch.Tensor.__dir__)
    return dir(value) if type(value).__dir__ in safe else sorted(object.__dir__(value))


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute that can be had without running code of the object's class."""
    if isinstance(value, nn.Module):
        for kept in (value._parameters, value._buffers, value._modules):  # noqa: SLF001  as its __getattr__ does
            if name in kept:
                return kept[name]
    found = inspect.getattr_static(value, name, _GONE)
    return _GONE if inspect.isdatadescriptor(found) else found
