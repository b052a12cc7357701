"""The kinds of fault: what the ranks run, and what is done to them meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAULTS", "SETUP", "VERIFY", "Fault"]

SETUP = """
mark = {mark!r}
import ctypes, itertools, os, re, signal, time
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        fail()

def fail():
    note()
    raise ValueError('the fault')

def note():
    with open(mark, 'w') as file:
        file.write(repr(time.time()))

def die(how):
    note()
    if how == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == 'segfault':
        ctypes.string_at(0)
    elif how == 'memory':
        torch.ones(2**60)
    else:
        os._exit(3)

torch.manual_seed(0)
data = TensorDataset(torch.randn(96, 8), torch.randn(96, 1))
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
model = DistributedDataParallel(net)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
kept = 'kept'

def step(fails=False):
    optimizer.zero_grad()
    x = torch.randn(4, 8)
    loss = model(FailsInBackward.apply(x.requires_grad_()) if fails else x).pow(2).mean()
    loss.backward()
    optimizer.step()
"""

VERIFY = """
total = torch.ones(1)
dist.all_reduce(total)
step()
assert rank == dist.get_rank() and kept == 'kept', (rank, dist.get_rank())
int(total), round(float(sum(p.double().sum() for p in net.parameters())), 10)
"""
"""What must hold after every fault: names, group, and replicas that stay equal."""

CELL = """
freed_s = None
is_me = rank == {rank}
try:
{body}
finally:
    freed_s = time.time()
    group = None  # who keeps a group keeps its threads
"""

_PLAIN = """
plain = nn.Linear(8, 1)
plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
for i, (xb, yb) in enumerate(batch for _ in range(10**6) for batch in
                             DataLoader(data, batch_size=8, shuffle=True)):
    plain_optimizer.zero_grad()
    loss = (plain(xb) - yb).pow(2).mean()
    if is_me and i == {step}:
        {fault}
    loss.backward()
    plain_optimizer.step()
"""
_DDP = """
for i in range(10**6):
    if is_me and i == {step}:
        {fault}
    step()
"""
_RAISE = "fail()"
_NOTHING = "pass"


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind.

    Attributes:
        body: the cell's; `{step}` is a random number.
        ends: `raised` (the rank's error ends the cell), `died` (its engine does),
            or `stopped` (the user does, and no error is shown).
        ename: the error's type, if one is raised.
        acts: what the driver does and when, in seconds after the ranks have begun:
            `press` (Interrupt), `now` (`%dist_stop --now`), `kill` (SIGKILL of the rank)
            or `suspend` (SIGSTOP of it).
        is_run: whether the cell trains under `%%dist_train`.
        ends_rank: whether the rank's engine has to be ended.
    """

    body: str
    ends: str = "raised"
    ename: str = "ValueError"
    acts: tuple[tuple[float, str], ...] = ()
    is_run: bool = False
    ends_rank: bool = False


FAULTS: dict[str, Fault] = {
    "raise in a plain run": Fault(_PLAIN.replace("{fault}", _RAISE), is_run=True),
    "raise between DDP steps": Fault(_DDP.replace("{fault}", _RAISE)),
    "raise in DDP's backward": Fault(_DDP.replace("{fault}", "step(fails=True)")),
    "raise beside a sub-group": Fault(
        "group = dist.new_group([rank for rank in range(world_size)])\n"
        "for i in range(10**6):\n    if is_me and i == {step}: fail()\n"
        "    dist.all_reduce(torch.ones(1000), group=group)"
    ),
    "raise before new_group": Fault("if is_me: fail()\ndist.new_group([0, 1])"),
    "raise with DataLoader workers": Fault(
        "for i, batch in enumerate(DataLoader(data, batch_size=2, num_workers=1)):\n"
        "    if is_me and i == {step}: fail()\n    dist.all_reduce(batch[0])"
    ),
    "raise while others compute": Fault("if is_me: fail()\nwhile True: step_of = sum(range(99))"),
    "out of memory": Fault(_DDP.replace("{fault}", "die('memory')"), ename="RuntimeError"),
    "out of memory in a run": Fault(
        _PLAIN.replace("{fault}", "die('memory')"), ename="RuntimeError", is_run=True
    ),
    "a loss that is not finite": Fault(
        _PLAIN.replace("{fault}", "note()\n        loss = loss * float('nan')"),
        ename="NonFiniteLossError",
        is_run=True,
    ),
    "stop now in a run": Fault(
        _PLAIN.replace("{fault}", _NOTHING), "stopped", acts=((0.3, "now"),), is_run=True
    ),
    "interrupt in Python": Fault(
        # Not `pass`: Python 3.11 can leave such a loop without its `finally`.
        "while True: step_of = sum(range(99))",
        "stopped",
        acts=((0.2, "press"), (0.4, "press")),
    ),
    "interrupt in a C extension": Fault(
        "re.match(r'(a?){28}a{28}$', 'a' * 27 + 'b')\nwhile True: time.sleep(9)",
        "stopped",
        acts=((0.2, "press"), (0.4, "press")),
    ),
    "interrupt in a collective": Fault(
        "dist.recv(torch.ones(1), src=(rank + 1) % world_size)",
        "stopped",
        acts=((0.2, "press"), (0.4, "press")),
    ),
    "interrupt twice in a run": Fault(
        _PLAIN.replace("{fault}", "dist.recv(torch.ones(1), src=(rank + 1) % world_size)"),
        "stopped",
        acts=((0.3, "press"), (0.5, "press")),
        is_run=True,
    ),
    "a rank ignores interrupts": Fault(
        "while is_me:\n    try:\n        time.sleep(9)\n    except KeyboardInterrupt: pass\n"
        "dist.barrier()",
        "stopped",
        acts=((0.2, "press"), (0.4, "press"), (2.0, "press"), (3.5, "press")),
        ends_rank=True,
    ),
    "a rank holds the GIL": Fault(
        "if is_me: sum(itertools.repeat(1, 10**12))\ndist.barrier()",
        "stopped",
        acts=((0.2, "press"), (0.4, "press"), (3.0, "press"), (4.5, "press")),
        ends_rank=True,
    ),
    "a rank is suspended": Fault(
        _DDP.replace("{fault}", _NOTHING),
        "stopped",
        acts=((0.2, "suspend"), (0.4, "press"), (0.6, "press"), (3.0, "press"), (4.5, "press")),
        ends_rank=True,
    ),
    "SIGKILL from outside": Fault(
        _DDP.replace("{fault}", _NOTHING), "died", acts=((0.3, "kill"),), ends_rank=True
    ),
    "SIGKILL in a run": Fault(
        _PLAIN.replace("{fault}", _NOTHING),
        "died",
        acts=((0.4, "kill"),),
        is_run=True,
        ends_rank=True,
    ),
    "segmentation fault": Fault(_DDP.replace("{fault}", "die('segfault')"), "died", ends_rank=True),
    "SIGKILL by itself": Fault(_DDP.replace("{fault}", "die('kill')"), "died", ends_rank=True),
    "os._exit": Fault(_DDP.replace("{fault}", "die('exit')"), "died", ends_rank=True),
}
