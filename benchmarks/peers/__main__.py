"""Measure dtkit beside its peers: `python -m benchmarks.peers [--only TASK,…] [--peers NAME,…]`.

What was measured in parts is put together by `python -m benchmarks.peers --join FILE …`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dtkit
from benchmarks.__main__ import heading, machine
from benchmarks.peers.functions import functions
from benchmarks.peers.install import REQUIREMENTS, install, versions
from benchmarks.peers.notebooks import keepers
from benchmarks.peers.peer import Missing
from benchmarks.peers.report import OURS, Found
from benchmarks.peers.room import Room
from benchmarks.peers.steps import steps
from benchmarks.peers.tasks import TASKS, Said
from benchmarks.peers.terminals import terminals
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.peer import Peer
    from benchmarks.peers.tasks import Task

_STEP = "step"
_NUM_BLOCKS = 12
_SLOW = ("Ray Train",)
"""Takes 17 s to run anything; measured where `--peers` names it."""
NAMES = [*TASKS, _STEP]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file.

    Returns:
        0 also when a peer cannot do something: that is what is to be found out.
    """
    args = _parse(argv)
    if args.join:
        _join(args.join)
        return 0
    python = install(args.environment)
    peers = _chosen([*keepers(python), *terminals(python), *functions(python)], args.peers)
    known = versions(python, {package for peer in peers for package in peer.packages})
    known["dtkit"] = dtkit.__version__
    if theirs := os.environ.get("HOROVOD_PYTHON"):
        known |= versions(Path(theirs), {"horovod"})
    peers = [_if_installed(peer, known) for peer in peers]
    known = {name: known[name] for name in sorted(known)}
    signal.signal(signal.SIGTERM, _leave)  # else what the peers have started would go on
    begun_s = time.monotonic()
    found = Found(begun_s + args.seconds)
    with (
        tempfile.TemporaryDirectory(prefix="dtkit-peers-") as folder,
        contextlib.ExitStack() as end,
    ):
        rooms = [Room(peer, Path(folder, peer.name.replace(" ", "-"))) for peer in peers]
        for room in rooms:
            end.callback(room.leave)
        rooms = [room for room in rooms if not room.peer.missing]
        for name in args.only or NAMES:
            if name == _STEP:
                _measure_steps(rooms, found, args.rounds or _NUM_BLOCKS)
            else:
                _measure(TASKS[name], rooms, found, args.rounds)
    facts = {**machine("benchmarks.peers"), "took_s": round(time.monotonic() - begun_s)}
    if found.is_late():
        print(f"stopped after {args.seconds} s\n")
    _print_tables(found, [peer for peer in peers if not peer.missing])
    for peer in peers:
        if peer.missing:
            print(f"\n{peer.name}: {peer.missing}")
    print(f"\n{', '.join(f'{name} {version}' for name, version in known.items())}")
    print(f"{heading(facts)}\nwritten to {args.output}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": facts, "versions": known, **found.to_dict()}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _print_tables(found: Found, peers: Sequence[Peer]) -> None:
    """Print a table of those whose ranks stay between cells, and one of the others, with dtkit."""
    for keeps in (True, False):
        names = [peer.name for peer in peers if peer.keeps is keeps and peer.name != OURS]
        if names:
            print(found.to_markdown([OURS, *names]) + "\n")


def _join(files: Sequence[Path]) -> None:
    """Print the tables of what was measured in parts, and on what."""
    reports = [json.loads(file.read_text()) for file in files]
    found = Found.read(reports)
    seen = {
        name
        for rows in (found.numbers, found.facts, found.missing)
        for peers in rows.values()
        for name in peers
    }
    here = Path(sys.executable)
    known_peers = [*keepers(here), *terminals(here), *functions(here)]
    _print_tables(found, [peer for peer in known_peers if peer.name in seen])
    known = {name: version for report in reports for name, version in report["versions"].items()}
    print(", ".join(f"{name} {known[name]}" for name in sorted(known)))
    for report in reports:
        print(heading(report["machine"]))


def _measure(task: Task, rooms: Sequence[Room], found: Found, num_rounds: int | None) -> None:
    """Take every peer once in each round, every second round in the opposite order."""
    for i in range(num_rounds or task.num_rounds):
        for room in rooms[:: 1 if i % 2 == 0 else -1]:
            if found.is_late():
                return
            _progress(f"{task.rows[0]}, {i + 1}, {room.peer.name}")
            try:
                said = task.measure(room)
            except Missing as reason:
                said = Said(missing={task.rows[0]: str(reason)})
            except BenchmarkError as error:
                room.leave()
                print(error, file=sys.stderr)
                said = Said(missing={task.rows[0]: f"failed: {str(error).splitlines()[0]}"})
            found.add(room.peer.name, i, said)


def _measure_steps(rooms: Sequence[Room], found: Found, num_rounds: int) -> None:
    _progress(_STEP)
    for name, blocks in steps(rooms, num_rounds).items():
        if isinstance(blocks, str):
            found.add(name, 0, Said(missing={_STEP: f"failed: {blocks.splitlines()[0]}"}))
        else:
            for i, step_s in enumerate(blocks):
                found.add(name, i, Said({_STEP: step_s}))


def _leave(_signal: int, _frame: object) -> None:
    raise SystemExit(1)


def _progress(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr)


def _chosen(peers: Sequence[Peer], names: Sequence[str] | None) -> list[Peer]:
    known = {peer.name: peer for peer in peers}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        msg = f"no peer is called {unknown[0]}; there are {', '.join(known)}"
        raise SystemExit(msg)
    return [known[name] for name in names or known if names or name not in _SLOW]


def _if_installed(peer: Peer, known: dict[str, str]) -> Peer:
    lacking = [name for name in peer.packages if name in REQUIREMENTS and name not in known]
    return replace(peer, missing=f"pip could not install {lacking[0]}") if lacking else peer


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="measure nothing")
    parser.add_argument("--only", type=_names, help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--peers", type=lambda text: text.split(","), help="some of the columns")
    parser.add_argument("--rounds", type=int, help="how many times each task is done")
    parser.add_argument("--seconds", type=int, default=600, help="begin nothing after so many")
    parser.add_argument("--environment", type=Path, default=Path("build/peers").absolute())
    parser.add_argument("--output", type=Path, default=Path("build/peers.json"))
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(NAMES)
    if unknown:
        msg = f"{', '.join(sorted(unknown))}: not among {', '.join(NAMES)}"
        raise argparse.ArgumentTypeError(msg)
    return names


if __name__ == "__main__":
    sys.exit(main())
