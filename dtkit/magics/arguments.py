"""Arguments of magics: argparse with `-h`, and errors that name the fix."""

from __future__ import annotations

import argparse
import re
import shlex
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError

from dtkit.driver.waiting import Interrupted
from dtkit.errors import DtkitError, RankError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HelpShown", "Parser", "usage_errors"]


class HelpShown(Exception):  # noqa: N818  not an error
    """`-h` was given: the help has been printed and there is nothing else to do."""


class Parser(argparse.ArgumentParser):
    """Parses a magic's line; never exits the kernel.

    What its arguments are called in the help (`metavar`) also says what completes them; see
    `dtkit.magics.completion`.

    Args:
        name: the magic, with its percent signs.
        about: what it does, in one sentence.
    """

    def __init__(self, name: str, about: str) -> None:
        super().__init__(
            prog=name, description=about, allow_abbrev=False, add_help=True, exit_on_error=False
        )

    def parse(self, line: str) -> argparse.Namespace:
        """Return the line's arguments.

        Raises:
            UsageError: the line cannot be read; the text says what would be right.
            HelpShown: `-h` was among them.
        """
        known: argparse.Namespace
        known, extra = self.parse_known_args(self.split(line))
        if extra:
            self.error(self._unknown(extra))
        return known

    def split(self, line: str) -> list[str]:
        """Return the line's words, quotes read as a shell reads them.

        Raises:
            UsageError: a quote is not closed.
        """
        try:
            return shlex.split(line)
        except ValueError as error:
            self.error(f"{error}: check the quotes")

    @property
    def magic(self) -> str:
        """The magic's name, without percent signs."""
        return self.prog.lstrip("%")

    @property
    def actions(self) -> list[argparse.Action]:
        """Every argument, `-h` included, in the order of the help."""
        return self._actions

    def options(self) -> list[str]:
        """Return every option, as it is written."""
        return [option for action in self._actions for option in action.option_strings]

    def options_with_value(self) -> set[str]:
        """Return the options after which the next word is their value."""
        return {
            option
            for action in self._actions
            if action.nargs is None
            for option in action.option_strings
        }

    def error(self, message: str) -> NoReturn:
        """Raise the message as IPython's UsageError."""
        msg = f"{self.prog}: {message}\n({self.prog} -h lists the options)"
        raise UsageError(msg)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End parsing after the help."""
        raise HelpShown(message or status)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:  # Any: argparse's overloads
        """Parse, with argparse's own errors turned into ours."""
        try:
            return super().parse_known_args(*args, **kwargs)
        except argparse.ArgumentError as error:
            self.error(str(error))

    def _unknown(self, words: list[str]) -> str:
        options = self.options()
        text = f"unrecognized arguments: {' '.join(words)}"
        hint = did_you_mean(re.split(r"[ =]", words[0])[0], options)
        return f"{text}; {hint}" if hint else text


def usage_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show what the user got wrong as a UsageError, without a traceback of ours."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except HelpShown:
            return None
        except (RankError, Interrupted):
            raise
        except KeyboardInterrupt:
            msg = f"%{function.__name__} was not done to its end"
            raise Interrupted(msg) from None
        except DtkitError as error:
            raise UsageError(str(error)) from None

    return wrapper
