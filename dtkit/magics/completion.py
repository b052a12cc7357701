"""Completion: options, their values, ranks, runs, and the names that live on the ranks.

IPython asks a matcher with the whole cell and the place of the cursor. In a magic's own line the
answer comes from its parser: an argument's `metavar` says what kind of value it takes. In a cell
that runs on the ranks, and where an object on them is to be named, a rank is asked; it answers
while it is busy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, SimpleMatcherResult, context_matcher

from dtkit import compression
from dtkit.driver.orphans import list_orphans
from dtkit.driver.registry import current_session, last_run
from dtkit.errors import DtkitError
from dtkit.magics.awaiting import CELL_MAGICS
from dtkit.magics.registry import PARSERS
from dtkit.strategy import STRATEGIES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from IPython.core.completer import CompletionContext
    from IPython.core.interactiveshell import InteractiveShell

    from dtkit.livecontrol import LiveControl
    from dtkit.magics.arguments import Parser

__all__ = ["install", "uninstall"]

_CELL_MAGIC = re.compile(r"%%(\w+)[ \t]*")
_LINE_MAGIC = re.compile(r"\s*(?:[\w.,\s]+=\s*)?%(\w+)[ \t]*")
_DOTTED = re.compile(r"(?<![\w.])((?:[^\W\d]\w*\.)*)((?:[^\W\d]\w*)?)$")
_IDENTIFIER = "dtkit"


def install(shell: InteractiveShell) -> None:
    """Let the shell ask here as well; `uninstall` takes it back."""

    @context_matcher(identifier=_IDENTIFIER)  # type: ignore[untyped-decorator]  # IPython's
    def matcher(context: CompletionContext) -> SimpleMatcherResult:
        return _match(shell, context)

    shell.Completer.custom_matchers.append(matcher)


def uninstall(shell: InteractiveShell) -> None:
    """Take away what `install` added."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _IDENTIFIER]


@dataclass(frozen=True, slots=True)
class _Found:
    """What fits at the cursor.

    Attributes:
        fragment: what has been typed of it.
        texts: what it may become, each with what it is.
        is_all: whether nothing else can stand there.
    """

    fragment: str
    texts: Iterable[tuple[str, str]]
    is_all: bool = True


def _match(shell: InteractiveShell, context: CompletionContext) -> SimpleMatcherResult:
    try:
        found = _find(shell, context)
    except DtkitError:  # the session has ended, a folder holds no runs
        found = None
    if found is None:
        return SimpleMatcherResult(completions=[])
    fitting = [
        SimpleCompletion(text=text, type=kind)
        for text, kind in found.texts
        if text.startswith(found.fragment)
    ]
    return SimpleMatcherResult(
        completions=fitting,
        suppress=found.is_all and bool(fitting),
        matched_fragment=found.fragment,
        ordered=True,
    )


def _find(shell: InteractiveShell, context: CompletionContext) -> _Found | None:
    before = context.text_until_cursor
    in_cell = _CELL_MAGIC.match(context.full_text)
    if in_cell and in_cell[1] in CELL_MAGICS:
        if context.cursor_line:
            return _names_on_ranks(before)
        at = _CELL_MAGIC.match(before)
    else:
        at = _LINE_MAGIC.match(before)
    if at is None or at[1] not in PARSERS or at.end() == at.end(1):
        return None  # the magic's own name is not over yet, and is IPython's to complete
    return _Line(shell, PARSERS[at[1]], before[at.end() :]).find()


def _names_on_ranks(before: str, *, is_all: bool = False) -> _Found | None:
    typed = _DOTTED.search(before)
    session = current_session()
    if typed is None or session is None or not typed[0]:
        return None
    texts = session.names(typed[1].rstrip(".")).items()
    return _Found(typed[2], texts, is_all)


class _Line:
    """A magic's line, up to the cursor."""

    def __init__(self, shell: InteractiveShell, parser: Parser, text: str) -> None:
        self._shell = shell
        self._parser = parser
        *self._words, self._word = re.split(r"\s+", text)

    def find(self) -> _Found | None:
        """Return what may stand at the cursor; None leaves it to IPython (a file, say)."""
        option, equals, value = self._word.partition("=")
        if option.startswith("-") and equals:
            action = self._option(option)
            return self._value(action, value) if action else None
        before = self._option(self._words[-1]) if self._words else None
        if before is not None and before.nargs is None:
            return self._value(before, self._word)
        if self._word.startswith("-"):
            return _Found(self._word, self._options())
        action = self._positional()
        if action is not None:
            return self._value(action, self._word)
        if self._parser.magic == "dist":
            return _names_on_ranks(self._word)
        return _Found(self._word, self._options()) if not self._word else None

    def _option(self, word: str) -> argparse.Action | None:
        found = (a for a in self._parser.actions if word in a.option_strings)
        return next(found, None)

    def _options(self) -> Iterator[tuple[str, str]]:
        for action in self._parser.actions:
            if not set(action.option_strings) & set(self._words):
                yield from ((text, "option") for text in action.option_strings[-1:])

    def _positional(self) -> argparse.Action | None:
        """Return the argument that the word at the cursor is, if it has no option before it."""
        wanted = [a for a in self._parser.actions if not a.option_strings]
        num_before = 0
        words = iter(self._words)
        for word in words:
            option = self._option(word)
            if option is None and word:
                num_before += 1
            elif option is not None and option.nargs is None:
                next(words, None)
        if num_before < len(wanted):
            return wanted[num_before]
        return wanted[-1] if wanted and wanted[-1].nargs in ("*", "+") else None

    def _value(self, action: argparse.Action, typed: str) -> _Found | None:
        choices = action.choices or self._choices_elsewhere(action)
        # A sweep takes several, with commas between them; ranks are written so anywhere.
        if self._parser.magic == "dist_sweep" or action.metavar == "RANKS":
            typed = typed.rpartition(",")[2]
        if choices:
            return _Found(typed, [(str(choice), "value") for choice in choices])
        if action.metavar == "VALUE":
            return _Found(typed, _values_of_control(self._words))
        if action.metavar == "NAME" and not action.option_strings:
            if self._parser.magic == "dist_push":
                return _Found(typed, self._notebooks_names())
            return _names_on_ranks(typed, is_all=True)
        values = _VALUES.get(str(action.metavar))
        return _Found(typed, values(self._shell)) if values else None

    def _choices_elsewhere(self, action: argparse.Action) -> Iterable[Any] | None:
        """Return the choices that a sweep has taken away, to take several with commas."""
        train = (a for a in PARSERS["dist_train"].actions if a.dest == action.dest)
        found = next(train, None) if self._parser.magic == "dist_sweep" else None
        return found.choices if found else None

    def _notebooks_names(self) -> list[tuple[str, str]]:
        names: dict[str, Any] = self._shell.user_ns
        hidden = self._shell.user_ns_hidden
        shown = (name for name in names if name not in hidden and not name.startswith("_"))
        return [(name, type(names[name]).__name__) for name in shown]


def _ranks(_shell: object = None) -> list[tuple[str, str]]:
    session = current_session()
    return [(str(rank), "rank") for rank in session.ranks] if session else []


def _run_names(shell: InteractiveShell) -> list[tuple[str, str]]:
    looking = shell.magics_manager.registry["DistLookMagics"]
    return [(name, "run") for name in looking.runs()]


def _controls() -> Mapping[str, LiveControl]:
    run = last_run()
    return run.controls if run is not None and run.state == "running" else {}


def _values_of_control(words: Iterable[str]) -> list[tuple[str, str]]:
    found = next((control for name, control in _controls().items() if name in words), None)
    if found is None:
        return []
    values = ("on", "off") if found.kind == "bool" else found.choices
    return [(str(value), "value") for value in values]


def _with_numbers(kinds: Iterable[str]) -> list[tuple[str, str]]:
    return [(kind, "value") for kind in kinds]


_VALUES: dict[str, Callable[[InteractiveShell], list[tuple[str, str]]]] = {
    "RANKS": lambda _shell: [("all", "rank"), *_ranks()],
    "R": _ranks,
    "RUN": _run_names,
    "CONTROL": lambda _shell: [(name, "control") for name in dict.fromkeys([*_controls(), "lr"])],
    "ID": lambda _shell: [(orphan.id, "session") for orphan in list_orphans()],
    "METHOD": lambda _shell: _with_numbers(
        f"{name}:{argument.example}" if argument else name
        for name, argument in compression.METHODS.items()
    ),
    "STRATEGY": lambda _shell: _with_numbers(
        f"{name}:{kind.example}" if kind.argument else name for name, kind in STRATEGIES.items()
    ),
}
"""What there is of each kind, by the argument's `metavar`."""
