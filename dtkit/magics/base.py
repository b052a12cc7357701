"""What all classes of magics share: the session, the notebook's names, one line said."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics
from IPython.display import display

from dtkit.driver.registry import current_session, obituary
from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from dtkit.driver.session import Session

__all__ = ["RANKS_HELP", "DtkitMagics", "say"]

RANKS_HELP = "ranks such as 0, 0,2 or 1:3 (default: all)"


class DtkitMagics(Magics):
    """Base of the classes of magics; a magic is parse, call, show."""

    @property
    def names(self) -> dict[str, Any]:  # Any: the user's own objects
        """The notebook's namespace."""
        shell: InteractiveShell | None = self.shell
        assert shell is not None  # noqa: S101  the magics were registered with one
        names: dict[str, Any] = shell.user_ns
        return names

    @property
    def session(self) -> Session:
        """The open session.

        Raises:
            InvalidInputError: there is none.
        """
        session = current_session()
        if session is None:
            msg = obituary() or "no engines are running: start them with %dist_init"
            raise InvalidInputError(msg)
        return session


def say(text: str) -> None:
    """Show a line under the cell."""
    display({"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}, raw=True)
