"""Random faults of all kinds, at random instants, on real engines, in one session.

make campaign N=200 TIME=1800 SEED=1
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
from faults import FAULTS
from harness import Rig
from report import Report

MARK = "DTKIT_CAMPAIGN"


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; 0 if nothing hung, was lost or was left behind."""
    args = _parse(argv)
    rng = random.Random(args.seed)
    report = Report(args.seed, args.ranks)
    os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"
    with tempfile.TemporaryDirectory(prefix="dtkit-campaign-") as folder:
        rig = Rig.start(args.ranks, rng, Path(folder))
        try:
            for kind in _order(rng, args.num, args.only):
                if args.seconds and report.elapsed_s > args.seconds:
                    break
                trial = rig.run(kind)
                report.add(trial)
                print(report.line(trial), flush=True)
        finally:
            rig.session.close()
    report.growth = list(rig.growth.values())
    report.num_orphans = len(_orphans())
    print(report)
    return 0 if report.is_good else 1


def _order(rng: random.Random, num: int, only: str | None) -> list[str]:
    """Return kinds in random order, each about as often as any other."""
    kinds = [kind for kind in FAULTS if not only or only in kind]
    order: list[str] = []
    while len(order) < num:
        order += rng.sample(kinds, len(kinds))
    return order[:num]


def _orphans() -> list[psutil.Process]:
    """Return processes of this campaign that are still there, wherever they hang."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(MARK) == os.environ[MARK]
        except psutil.Error:  # another user's, or just gone
            continue
        if is_ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make campaign", description=__doc__)
    parser.add_argument("--num", type=int, default=40, help="how many faults")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: never")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--only", help="kinds that contain this text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
