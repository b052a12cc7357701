"""`horovodrun`: the same script on several ranks of this host."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from itertools import pairwise
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError
from dtkit.horovod.launch.arguments import Arguments, parse
from dtkit.horovod.launch.elastic import run_elastic
from dtkit.horovod.launch.workers import STAND_IN, Worker, Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["defer_or_run", "main"]


def defer_or_run() -> int:
    """Be `horovodrun`: Horovod's own where it is installed, unless `--hvd dtkit` is given."""
    words = sys.argv[1:]
    wants_ours = "--hvd=dtkit" in words or ("--hvd", "dtkit") in pairwise(words)
    if not wants_ours and _has_horovod():
        from horovod.runner.launch import run_commandline

        return int(run_commandline() or 0)
    return main()


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code of a rank that failed, else 0."""
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        if arguments.is_check:
            sys.stdout.write(_what_there_is())
            return 0
        if arguments.without_effect:
            listed = ", ".join(arguments.without_effect)
            sys.stderr.write(f"horovodrun: without effect on torch.distributed: {listed}\n")
        return _run(arguments)
    except InvalidInputError as error:
        sys.stderr.write(f"horovodrun: {error}\n")
        return 2


def _run(arguments: Arguments) -> int:
    environment = dict(arguments.environment)
    if arguments.is_ours:
        path = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(STAND_IN), *([path] if path else [])])
    if arguments.is_verbose:
        shown = " ".join(f"{name}={value}" for name, value in sorted(environment.items()))
        words = " ".join(arguments.command)
        sys.stderr.write(f"horovodrun: {arguments.num_proc} times: {shown} {words}\n")
    try:
        if arguments.min_num_proc is None:
            failed = _run_all(arguments, environment)
        else:
            last = run_elastic(arguments, environment)
            failed = [] if last is None else [last]
    except KeyboardInterrupt:
        return 130
    if not failed:
        return 0
    ended = "; ".join(f"rank {worker.number} {_how(worker.code or 1)}" for worker in failed)
    sys.stderr.write(f"horovodrun: {ended}; the others were ended\n")
    code = failed[0].code or 1
    return code if code > 0 else 128 - code


def _how(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _run_all(arguments: Arguments, environment: dict[str, str]) -> list[Worker]:
    workers = Workers(arguments.command, arguments.num_proc, environment, arguments.output_dir)
    try:
        return workers.settle() if workers.wait() else []
    finally:
        workers.stop()


def _has_horovod() -> bool:
    try:
        metadata.distribution("horovod")
    except metadata.PackageNotFoundError:
        return False
    return True


def _what_there_is() -> str:
    import torch
    import torch.distributed as dist

    def line(name: str, is_there: bool) -> str:  # noqa: FBT001
        return f"    [{'X' if is_there else ' '}] {name}\n"

    return (
        f"dtkit {metadata.version('dtkit')} with torch {torch.__version__}:\n\n"
        "Available Frameworks:\n"
        + line("TensorFlow", is_there=False) + line("PyTorch", is_there=True)
        + line("MXNet", is_there=False)
        + "\nAvailable Controllers:\n" + line("MPI", is_there=False) + line("Gloo", is_there=True)
        + "\nAvailable Tensor Operations:\n"
        + line("NCCL", is_there=dist.is_nccl_available() and torch.cuda.is_available())
        + line("DDL", is_there=False) + line("CCL", is_there=False) + line("MPI", is_there=False)
        + line("Gloo", is_there=dist.is_gloo_available())
    )  # fmt: skip
