"""Run Horovod's own tests of its torch interface against dtkit's, out of tree and unmodified.

    python tools/hvd_conformance.py PATH_OF_A_HOROVOD_CHECKOUT [-np 2] [-k EXPRESSION]

Nothing of the checkout is copied. Its tests' helpers import two things that dtkit
does not have, `mock` and one function of Horovod's launcher; stand-ins are given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import types
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtkit.horovod.launch.workers import STAND_IN, Workers

OUTPUT = Path("build/hvd-conformance")
NOT_OURS = {
    "Muon only supports 2D parameters": "torch's Muon refuses the test's biases, under any Horovod",
}
"""Text of a failure -> why it says nothing about who combines gradients."""


class Outcomes:
    """A plugin of pytest's that keeps how each test ended."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the worst of set-up, call and tear-down."""
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.found[name] = ("failed", str(report.longrepr))
        elif report.skipped:
            self.found.setdefault(name, ("skipped", str(report.longrepr[2])))
        elif report.when == "call":
            self.found.setdefault(name, ("passed", ""))


def run_rank(source: Path, expression: str) -> int:
    """Run the tests as one rank."""
    import horovod  # noqa: F401  before its stand-ins

    sys.modules.setdefault("mock", unittest.mock)
    threads = types.ModuleType("horovod.runner.util.threads")
    threads.in_thread = _in_thread  # type: ignore[attr-defined]
    for name in ("horovod.runner", "horovod.runner.util"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[threads.__name__] = threads
    outcomes = Outcomes()
    test = source / "test/parallel/test_torch.py"
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default",
               "--timeout", "120", "--rootdir", str(source)]  # fmt: skip
    if expression:
        options += ["-k", expression]
    code = pytest.main([*options, str(test)], plugins=[outcomes])
    path = OUTPUT / f"rank-{os.environ['HOROVOD_RANK']}.json"
    path.write_text(json.dumps(outcomes.found))
    return 0 if code in (0, 1) else int(code)


def _in_thread(target: Any, args: Any = (), name: Any = None) -> Any:
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def run(source: Path, num_ranks: int, expression: str) -> int:
    """Run the tests on ranks, and print what did not pass everywhere."""
    if not (source / "test/parallel/test_torch.py").is_file():
        print(f"{source}: no checkout of github.com/horovod/horovod. Say where one is:")
        print("    make hvd-conformance HOROVOD_SRC=path/to/horovod")
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for path in OUTPUT.glob("rank-*.json"):
        path.unlink()
    command = [sys.executable, __file__, str(source), "-k", expression, "--as-rank"]
    folders = [p for p in (os.environ.get("PYTHONPATH"), str(STAND_IN)) if p]
    environment = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    workers = Workers(command, num_ranks, environment, str(OUTPUT), is_quiet=True)
    try:
        if workers.wait() is not None:
            print(f"a rank did not run the tests to their end: see {OUTPUT}/rank.*")
            return 1
    finally:
        workers.stop()
    ranks = [json.loads((OUTPUT / f"rank-{r}.json").read_text()) for r in range(num_ranks)]
    return report(ranks)


def report(ranks: list[dict[str, tuple[str, str]]]) -> int:
    """Print the figure and what did not pass; returns 1 if something failed that is ours."""
    worst = {}
    for name in ranks[0]:
        ends = [rank.get(name, ("failed", "not run")) for rank in ranks]
        worst[name] = min(ends, key=lambda end: ("failed", "skipped", "passed").index(end[0]))
    counts = Counter(end for end, _ in worst.values())
    print(f"{counts['passed']} of {len(worst)} pass on {len(ranks)} ranks, "
          f"{counts['skipped']} skip themselves, {counts['failed']} fail")  # fmt: skip
    is_ours = False
    for name, (end, text) in sorted(worst.items(), key=lambda item: (item[1][0], item[0])):
        if end == "passed":
            continue
        why = [reason for sign, reason in NOT_OURS.items() if sign in text]
        is_ours |= end == "failed" and not why
        shown = why[0] if why else (text.strip().splitlines() or [""])[-1]
        print(f"  {end:8} {name}: {shown}")
    return int(is_ours)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("source", type=Path)
    parser.add_argument("-np", type=int, default=2)
    parser.add_argument("-k", default="")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return run_rank(args.source, args.k)
    return run(args.source, args.np, args.k)


if __name__ == "__main__":
    sys.exit(main())
