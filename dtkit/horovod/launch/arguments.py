"""The command line of `horovodrun`."""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtkit.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Arguments", "parse"]

_FLAGS_WITHOUT_EFFECT = (
    "--gloo", "--mpi", "--jsrun", "--disable-cache", "--hierarchical-allreduce",
    "--no-hierarchical-allreduce", "--hierarchical-allgather", "--no-hierarchical-allgather",
    "--torus-allreduce", "--no-torus-allreduce", "--autotune", "--no-autotune", "--tcp",
    "--log-with-timestamp", "--log-without-timestamp", "--prefix-output-with-timestamp",
    "--no-timeline-mark-cycles", "--stall-check",
)  # fmt: skip
_OPTIONS_WITHOUT_EFFECT = (
    "--network-interfaces", "--config-file", "-p --ssh-port", "-i --ssh-identity-file",
    "--cycle-time-ms", "--cache-capacity", "--autotune-log-file", "--autotune-warmup-samples",
    "--autotune-steps-per-sample", "--autotune-bayes-opt-max-samples",
    "--autotune-gaussian-process-noise", "--slots-per-host", "--elastic-timeout",
    "--blacklist-cooldown-range", "--host-discovery-script", "--mpi-args", "--binding-args",
    "--num-nccl-streams", "--thread-affinity", "--gloo-timeout-seconds", "--log-level",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What `horovodrun` was asked for.

    Attributes:
        num_proc: how many ranks.
        min_num_proc: how many must be left to go on when one ends, None: all.
        reset_limit: how often that may happen, None: any number of times.
        command: what each rank runs.
        environment: variables that the options stand for.
        output_dir: where each rank's output is kept, None: shown only.
        without_effect: options that were given and mean nothing here.
    """

    num_proc: int
    min_num_proc: int | None
    reset_limit: int | None
    command: tuple[str, ...]
    environment: dict[str, str]
    output_dir: str | None
    is_ours: bool
    is_verbose: bool
    is_check: bool
    without_effect: tuple[str, ...]


def parse(words: Sequence[str]) -> Arguments:
    """Read a command line.

    Raises:
        InvalidInputError: it names other hosts, or no command.
        SystemExit: it cannot be read, or asks for help or the version.
    """
    given = _parser().parse_args(words)
    command = tuple(given.command[1:] if given.command[:1] == ["--"] else given.command)
    num_proc = _num_proc(given)
    if not command and not given.check_build:
        msg = "name what to run: horovodrun -np 4 python train.py"
        raise InvalidInputError(msg)
    least = given.min_np
    if least is not None and not 1 <= least <= num_proc:
        msg = f"--min-np {least}: it must be from 1 to the number of ranks, {num_proc}"
        raise InvalidInputError(msg)
    return Arguments(
        num_proc=num_proc,
        min_num_proc=least,
        reset_limit=given.reset_limit,
        command=command,
        environment=_environment(given),
        output_dir=given.output_filename,
        is_ours=given.hvd == "dtkit",
        is_verbose=given.verbose,
        is_check=given.check_build,
        without_effect=tuple(dict.fromkeys(given.without_effect)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="horovodrun",
        description="Run a script on several ranks of this host, with dtkit's Horovod interface.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-np", "--num-proc", type=int, metavar="N", help="number of ranks")
    add("-H", "--hosts", metavar="HOST:N", help="localhost:N; other hosts: mpirun or srun")
    add("-hostfile", "--hostfile", metavar="FILE", help="lines such as `localhost slots=4`")
    add(
        "--min-np",
        "--min-num-proc",
        type=int,
        metavar="N",
        help="go on with the others when a rank ends, down to this many (hvd.elastic)",
    )
    add(
        "--max-np",
        "--max-num-proc",
        type=int,
        metavar="N",
        help="most ranks at a time; more than -np are not started",
    )
    add("--reset-limit", type=int, metavar="N", help="how often ranks may be lost")
    add("--start-timeout", type=int, metavar="S", help="seconds that ranks wait for each other")
    add("--fusion-threshold-mb", type=int, metavar="MB", help="most gradients sent at once")
    add("--timeline-filename", metavar="FILE", help="write a timeline (HOROVOD_TIMELINE)")
    add("--timeline-mark-cycles", action="store_true", help="mark cycles in it")
    add("--no-stall-check", action="store_true", help="do not warn of ranks that do not come")
    add("--stall-check-warning-time-seconds", type=float, metavar="S", help="warn after (60)")
    add("--stall-check-shutdown-time-seconds", type=float, metavar="S", help="fail after (never)")
    add("--output-filename", metavar="DIR", help="keep output in DIR/rank.N/stdout and stderr")
    add("--hvd", choices=("auto", "dtkit"), default="auto", help="dtkit: also beside Horovod")
    add("-cb", "--check-build", action="store_true", help="say what there is, and end")
    add("-v", "--version", action="version", version="dtkit's horovodrun")
    add("--verbose", action="store_true", help="say what is started")
    for flags in _FLAGS_WITHOUT_EFFECT:
        add(flags, action=_WithoutEffect, nargs=0, help=argparse.SUPPRESS)
    for option in _OPTIONS_WITHOUT_EFFECT:
        add(*option.split(), action=_WithoutEffect, help=argparse.SUPPRESS)
    parser.set_defaults(without_effect=[])
    add("command", nargs=argparse.REMAINDER, help="the command that every rank runs")
    return parser


class _WithoutEffect(argparse.Action):
    """Takes an option of Horovod's that means nothing here, and notes that it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        del parser, values
        namespace.without_effect = [*namespace.without_effect, option_string]


def _num_proc(given: argparse.Namespace) -> int:
    slots = _slots(_hosts(given))
    num_proc = given.num_proc or given.min_np or slots or (1 if given.check_build else None)
    if given.max_np is not None and num_proc is not None:
        num_proc = min(num_proc, given.max_np)
    if not num_proc or num_proc < 1:
        msg = "say how many ranks: horovodrun -np 4 python train.py"
        raise InvalidInputError(msg)
    if slots and num_proc > slots:
        msg = f"-np {num_proc} is more than the {slots} slots of the hosts"
        raise InvalidInputError(msg)
    return int(num_proc)


def _hosts(given: argparse.Namespace) -> list[tuple[str, int]]:
    if given.hosts:
        pairs = [entry.partition(":") for entry in given.hosts.split(",")]
        return [(host, _num_slots(host, num or "1")) for host, _, num in pairs]
    if not given.hostfile:
        return []
    try:
        text = Path(given.hostfile).read_text()
    except OSError as error:
        msg = f"--hostfile: {error}"
        raise InvalidInputError(msg) from None
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    settings = [
        (words[0], dict(word.split("=", 1) for word in words[1:] if "=" in word))
        for words in lines
        if words
    ]
    return [(host, _num_slots(host, said.get("slots", "1"))) for host, said in settings]


def _num_slots(host: str, text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    msg = f"{host}: {text!r} is no number of slots, as in localhost:2 or `localhost slots=2`"
    raise InvalidInputError(msg)


def _slots(hosts: Sequence[tuple[str, int]]) -> int:
    here = {"localhost", "127.0.0.1", "::1", platform.node(), platform.node().split(".")[0]}
    others = [host for host, _ in hosts if host not in here]
    if others:
        msg = (
            f"{', '.join(others)}: dtkit's horovodrun starts ranks on this host only. On several "
            "hosts use mpirun or srun, with MASTER_ADDR and MASTER_PORT set, or torchrun"
        )
        raise InvalidInputError(msg)
    return sum(num for _, num in hosts)


def _environment(given: argparse.Namespace) -> dict[str, str]:
    values = {
        "HOROVOD_START_TIMEOUT": given.start_timeout,
        "HOROVOD_FUSION_THRESHOLD": given.fusion_threshold_mb and given.fusion_threshold_mb << 20,
        "HOROVOD_TIMELINE": given.timeline_filename,
        "HOROVOD_TIMELINE_MARK_CYCLES": "1" if given.timeline_mark_cycles else None,
        "HOROVOD_STALL_CHECK_DISABLE": "1" if given.no_stall_check else None,
        "HOROVOD_STALL_CHECK_TIME_SECONDS": given.stall_check_warning_time_seconds,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": given.stall_check_shutdown_time_seconds,
    }
    if given.fusion_threshold_mb == 0:
        values["HOROVOD_FUSION_THRESHOLD"] = 0
    return {name: str(value) for name, value in values.items() if value is not None}
