"""Preflight: what must be alike on all hosts, whether it is, and how well they reach each other."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

from dtkit.values import HostLink

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dtkit.cluster.engines import Engines
    from dtkit.cluster.remote.facts import HostFacts

__all__ = ["complaints", "measure_links", "unreached", "warnings", "without_peer_access"]

_MAX_ALL_PAIRS = 8
"""With more hosts each is asked about the next one only."""
_TIMEOUT_S = 40.0
_PEERS_TIMEOUT_S = 70.0
"""torch is loaded for it."""
_MAX_CLOCK_OFFSET_S = 1.0
_MIN_SHARED_MEMORY_BYTES = 1 << 30
"""DataLoader workers hand their batches over in it; Docker gives 64 MiB."""


def complaints(hosts: Sequence[HostFacts], names: Sequence[str]) -> list[str]:
    """Return why these hosts cannot train together, each with its fix; nothing if they can."""
    found = []
    for what in sorted({name for facts in hosts for name in facts.versions}):
        versions = [facts.versions.get(what, "none") for facts in hosts]
        if len(set(versions)) > 1:
            found.append(
                f"{what} differs: {_told(versions, names)}. Install the same version everywhere, "
                "or name another interpreter with --python PATH"
            )
    codes = [facts.code for facts in hosts]
    if not found and len(set(codes)) > 1:
        found.append(
            f"dtkit has one version and different files: {_told(codes, names)} (a checksum). "
            "Install the same commit everywhere"
        )
    return found


def warnings(
    hosts: Sequence[HostFacts], names: Sequence[str], between_s: tuple[float, float]
) -> list[str]:
    """Return what is better mended, each with its fix.

    Args:
        hosts: what each says of itself.
        names: how they are called.
        between_s: between which two times of this host's clock they read theirs.
    """
    found = []
    for facts, name in zip(hosts, names, strict=True):
        offset_s = facts.unix_s - min(max(facts.unix_s, between_s[0]), between_s[1])
        if abs(offset_s) > _MAX_CLOCK_OFFSET_S:
            found.append(
                f"{name}'s clock is {abs(offset_s):.0f} s {'ahead' if offset_s > 0 else 'behind'}: "
                "times in logs and files will not agree; let chrony or ntpd set it"
            )
        if facts.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES:
            mib = facts.shared_memory_bytes >> 20
            found.append(
                f"{name} has {mib} MiB of /dev/shm, and DataLoader workers hand batches over in "
                "it: docker run --shm-size=8g, or num_workers=0"
            )
    return found


def without_peer_access(
    agents: Engines, hosts: Sequence[HostFacts], names: Sequence[str]
) -> list[str]:
    """Return on which hosts GPUs cannot read each other's memory, with what that means."""
    several = [number for number, facts in enumerate(hosts) if len(facts.gpus) > 1]
    answers = agents.control("peers", ranks=several, timeout_s=_PEERS_TIMEOUT_S) if several else {}
    found = []
    for number in several:
        answer = answers.get(number, {"error": "its agent does not answer"})
        gpus = hosts[number].gpus
        pairs = ", ".join(f"{gpus[a]} and {gpus[b]}" for a, b in answer.get("pairs", ()))
        if pairs:
            found.append(
                f"{names[number]}: GPUs {pairs} have no peer access, so NCCL copies between them "
                "through the host's memory; `nvidia-smi topo -m` shows how they are connected"
            )
        elif "error" in answer:
            found.append(f"{names[number]}: GPU peer access is not known: {answer['error']}")
    return found


def measure_links(
    agents: Engines, hosts: Sequence[HostFacts], names: Sequence[str], for_s: float
) -> tuple[HostLink, ...]:
    """Measure the way from each host to the others, one after the other.

    Args:
        agents: of the hosts, by number.
        hosts: what each says of itself.
        names: how they are called.
        for_s: how long each pair sends at full speed; 0: only the latency.
    """
    links = []
    listening: dict[int, dict[str, object]] = {}
    for source, target in _pairs(len(hosts)):
        if target not in listening:
            answers = agents.control("listen", {"address": hosts[target].address}, ranks=[target])
            listening[target] = answers.get(target, {"error": "its agent does not answer"})
        found = listening[target]
        if "error" not in found:
            request = {**found, "for_s": for_s}
            answers = agents.control("measure", request, ranks=[source], timeout_s=_TIMEOUT_S)
            found = answers.get(source, {"error": f"{names[source]}'s agent does not answer"})
        links.append(
            HostLink(
                source=names[source], target=names[target], address=hosts[target].address,
                latency_ms=_number(found, "latency_ms"), mbit_per_s=_number(found, "mbit_per_s"),
                error=str(found.get("error", "")),
            )
        )  # fmt: skip
    return tuple(links)


def unreached(links: Iterable[HostLink]) -> list[str]:
    """Return which hosts do not reach which, with the fix."""
    return [
        f"{link.source} does not reach {link.target} at {link.address} ({link.error}): let the "
        "hosts' firewalls pass each other's TCP, or name a network that joins them with "
        "--interface NAME"
        for link in links
        if link.error
    ]


def _pairs(num: int) -> Iterable[tuple[int, int]]:
    if num <= _MAX_ALL_PAIRS:
        return permutations(range(num), 2)
    return [(i, (i + 1) % num) for i in range(num)]


def _number(found: dict[str, object], name: str) -> float | None:
    value = found.get(name)
    return float(value) if isinstance(value, int | float) else None


def _told(values: Sequence[str], names: Sequence[str]) -> str:
    return ", ".join(f"{value} on {name}" for value, name in zip(values, names, strict=True))
