"""Values of options that are written NAME or NAME:NUMBER."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["split_spec"]


def split_spec(flag: str, text: str, arguments: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the name and what stands after its colon, None if the name takes nothing.

    Args:
        flag: the option, for messages.
        text: its value.
        arguments: what may be named, and what the number is called; "": it takes none.

    Raises:
        InvalidInputError: there is no such name, or it has a number that it does not take.
    """
    name, colon, number = text.partition(":")
    if name not in arguments:
        usages = (f"{n}:{argument}" if argument else n for n, argument in arguments.items())
        msg = f"{flag} {text}: choose one of {', '.join(usages)}"
        raise InvalidInputError(msg)
    if arguments[name]:
        return name, number
    if colon:
        msg = f"{flag} {text}: {name} takes no number; write {flag} {name}"
        raise InvalidInputError(msg)
    return name, None
