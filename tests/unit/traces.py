"""Timelines of runs that never were: what each rank does in a step is said in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dtkit.trace.rows import Collective, Head, RankTrace, Span, Step, Tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

NS = 1_000_000
DATA, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER = range(5)


@dataclass(frozen=True)
class Plan:
    """Milliseconds of one rank's step; how long it waits follows from the others."""

    data: int = 1
    forward: int = 10
    backward: int = 20
    optimizer: int = 2
    idle: int = 0


def make_traces(
    plans: Sequence[Plan], num_steps: int = 10, *, transfer: int = 3, num_bytes: int = 3 << 20
) -> list[RankTrace]:
    """Return the timeline of a run whose ranks do as planned.

    Two collectives a step: one leaves in the middle of the backward pass, and takes
    1 ms; the other at its end, and takes `transfer`.
    """
    ranks = tuple(range(len(plans)))
    traces = [RankTrace(make_head(rank, ranks), groups={0: ranks}) for rank in ranks]
    for trace in traces:
        trace.tensors[0] = Tensors(("allreduce.1.weight", "allreduce.1.bias"), "float32", (110,))
        trace.tensors[1] = Tensors(("allreduce.0.weight",), "float32", (100,))
    at = dict.fromkeys(ranks, 0)
    for number in range(1, num_steps + 1):
        begun = {r: at[r] + p.data + p.forward for r, p in enumerate(plans)}
        middle = {r: begun[r] + p.backward // 2 for r, p in enumerate(plans)}
        final = {r: begun[r] + p.backward for r, p in enumerate(plans)}
        first_done = max(middle.values()) + 1
        done = max(*final.values(), first_done) + transfer
        for r, plan in enumerate(plans):
            spans = [
                (DATA, at[r], at[r] + plan.data),
                (FORWARD, at[r] + plan.data, begun[r]),
                (BACKWARD, begun[r], final[r]),
                (COMMUNICATION, final[r], done),
                (OPTIMIZER, done, done + plan.optimizer),
            ]
            parts = [
                (0, 2 * number - 1, 0, middle[r], first_done),
                (0, 2 * number, 1, final[r], done),
            ]
            end = done + plan.optimizer + plan.idle
            traces[r].steps.append(
                Step(
                    number, at[r] * NS, end * NS,
                    [Span(phase, start * NS, stop * NS) for phase, start, stop in spans],
                    [
                        Collective(
                            operation, 0, sequence, tensors, call * NS, call * NS, stop * NS,
                            done * NS, (done * NS) + 1000, num_bytes,
                        )
                        for operation, sequence, tensors, call, stop in parts
                    ],
                )
            )  # fmt: skip
            at[r] = end
    return traces


def make_head(rank: int, ranks: tuple[int, ...]) -> Head:
    return Head(
        rank=rank, ranks=ranks, host="node1", device=f"cuda:{rank}", backend="gloo",
        start_unix_s=1.8e9, start_ns=0,
    )  # fmt: skip


def with_head(trace: RankTrace, **changes: object) -> RankTrace:
    """Return the trace with another head."""
    return replace(trace, head=replace(trace.head, **changes))
