"""Whatever is typed after a magic's name ends in a result or in a UsageError that says the fix.

The magics are called as IPython calls them, on a real session: only the engines and the processes
around it are stand-ins, which answer at once. So what is parsed, checked and refused is all real.
"""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from dtkit.chunks import Exported
from dtkit.cluster import Execution, Reply, Slot, place_local
from dtkit.driver import clusters
from dtkit.driver.registry import current_session
from dtkit.driver.session import Session
from dtkit.magics import MAGICS, PARSERS
from dtkit.tensorboard import server
from dtkit.values import HostCheck

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dtkit.cluster import Wish
    from dtkit.guard.record import SessionRecord
    from dtkit.launch import Launch

# Any, below: what engines take and answer.

MAGIC_NAMES = sorted(
    {(kind, name) for made in MAGICS for kind, names in made.magics.items() for name in names}
)
NUM_LINES = 20
"""Of one example, so that most of the time goes to our code and not to Hypothesis."""
NUM_EXAMPLES = 10_000 // (NUM_LINES * len(MAGIC_NAMES)) + 1
"""For each: all together make ten thousand lines, however many magics there come to be."""

OPTIONS = sorted({option for parser in PARSERS.values() for option in parser.options()})
VALUES = (
    "all", "0,1", "1:3", "::", "-1", "9", "cpu", "gloo", "nccl", "global", "stop", "nan", "1e400",
    "1000000000", "0", "model", "model.weight", "x", "nothing", "train.py", "..", "topk:0.1",
    "''", '"', "'a b'", "--", "-", "=", "a=b", "1+", "x" * 300,
)  # fmt: skip
# Neither a slash nor a tilde: what is written must stay where the test is.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="/~{}$", exclude_categories=["Cs"]), max_size=20
)
WORD = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(OPTIONS), st.sampled_from(VALUES) | TEXT),
    st.integers().map(str),
    TEXT,
)
LINE = st.lists(WORD, max_size=6).map(" ".join)
LINES = st.lists(LINE, min_size=NUM_LINES, max_size=NUM_LINES)


class FakeEngines:
    """Four ranks that do at once whatever they are told."""

    ranks = (0, 1, 2, 3)
    lost = ()
    host_of = dict.fromkeys(range(8), "")
    is_closed = False
    broken = ""

    def call(self, function: str, *_args: Any, ranks: Any = None, **_kwargs: Any) -> dict[int, Any]:
        facts = {"device_name": "none", "torch": "0", "python": "0", "host": "here"}
        answers = {
            "dtkit.engine.process.transfer:export": Exported(0, pickle.dumps(None), [], [], [], []),
            "dtkit.engine.process.group:open_store": ("127.0.0.1", 1),
            "dtkit.engine.process.refill:export": (b"", [], []),
            "dtkit.engine.check:collect": {
                key: {} for key in ("parts", "missing", "random", "data")
            },
            "dtkit.engine.process.refill:equalize": [],
            "dtkit.engine.replicas:names_of_replicas": [],
        }
        answer = answers.get(function, facts)
        return dict.fromkeys(ranks or self.ranks, answer)

    def execute(
        self, _code: str, ranks: tuple[int, ...], _on_message: Any, _wake: Any
    ) -> Execution:
        return Execution(tuple(ranks), {}, {}, {rank: Reply(rank, "ok") for rank in ranks})

    def control(self, _operation: str, *_args: Any, **_kwargs: Any) -> dict[int, Any]:
        return {}

    def signal(self, _number: int, _ranks: Any) -> None:
        pass


class FakeCluster:
    """A cluster without processes."""

    warnings = ()

    def __init__(self, record: SessionRecord, **_options: Any) -> None:
        self.record = record
        self.slots = tuple(Slot(**slot) for slot in record.slots)
        self.engines = FakeEngines()

    def stop(self, **_how: Any) -> None:
        self.record.dir.rmdir()

    def replace(self, _ranks: Any) -> None:
        pass

    def leave(self) -> None:
        pass

    def bring_files(self, _folder: Any) -> None:
        pass


class FakeBoard:
    """A TensorBoard that shows nothing."""

    is_alive = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        pass


class FakeRemoteCluster(FakeCluster):
    """The same over hosts that are not looked for."""

    def __init__(self, record: SessionRecord, launch: Launch, *_more: Any, **_options: Any) -> None:
        launch.ranks_by_host(None)
        super().__init__(record)

    @classmethod
    def started(
        cls, record: SessionRecord, launch: Launch, wish: Wish, **_options: Any
    ) -> FakeRemoteCluster:
        launch.ranks_by_host(wish.num_ranks)
        slots = place_local(2, "cpu", oversubscribe=False)
        return cls(replace(record, slots=tuple(map(asdict, slots)), backend="gloo"), launch)

    def check(self, _for_s: float) -> HostCheck:
        return HostCheck(problems=(), warnings=(), links=())


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    """A shell with the magics, in a folder of its own, without engines."""
    folder = tmp_path_factory.mktemp("fuzz") / "inner"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DTKIT_UI", "off")
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setattr(clusters, "LocalCluster", FakeCluster)
        patch.setattr(clusters, "RemoteCluster", FakeRemoteCluster)
        patch.setattr(server, "TensorBoard", FakeBoard)
        shell = InteractiveShell.instance(colors="nocolor")
        shell.run_line_magic("load_ext", "dtkit")
        shell.user_ns.update(x=1, model=[2])
        yield shell
        close()
        shell.run_line_magic("unload_ext", "dtkit")
        InteractiveShell.clear_instance()


def close() -> None:
    session = current_session()
    if session is not None:
        session.close()


@pytest.mark.parametrize(("kind", "name"), MAGIC_NAMES)
@settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(typed=LINES, is_open=st.booleans(), cell=st.sampled_from(["x = 1\n", "", "  \n"]))
def test_any_line_succeeds_or_says_what_would_be_right(
    shell: InteractiveShell, kind: str, name: str, typed: list[str], cell: str, *, is_open: bool
) -> None:
    for line in typed:
        if not is_open:
            close()
        elif current_session() is None:
            Session.start(4, devices="cpu")
        assert said_by(shell, kind, name, line, cell) != ""


def said_by(shell: InteractiveShell, kind: str, name: str, line: str, cell: str) -> str | None:
    """Return what a magic says is wrong, None if nothing is; any other error comes through."""
    try:
        if kind == "cell":
            shell.run_cell_magic(name, line, cell)
        else:
            shell.run_line_magic(name, line)
    except UsageError as error:
        return str(error)
    return None
