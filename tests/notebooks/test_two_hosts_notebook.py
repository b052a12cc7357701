"""The tutorial on two hosts, with hosts of the test's own in place of the reader's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import nbformat
import pytest
from test_notebooks import ROOT, execute, printed
from test_when_a_rank_fails import error_of

from testbed.sshd import SshHosts, why_no_ssh_hosts

if TYPE_CHECKING:
    from nbformat import NotebookNode

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(bool(why_no_ssh_hosts()), reason=why_no_ssh_hosts() or "-"),
]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The tutorial, executed on the first host; nothing of it is left on either."""
    notebook = nbformat.read(ROOT / "notebooks/09_two_hosts.ipynb", as_version=4)
    with (
        SshHosts(2, tmp_path_factory.mktemp("hosts")) as hosts,
        hosts.host("host-a").entered(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("OMP_NUM_THREADS", "1")
        for cell in notebook.cells:
            cell.source = re.sub("alpha|beta", lambda m: f"host-{m[0][0]}", cell.source)
            cell.source = re.sub(
                r"--engines ssh",
                f'--engines ssh --devices cpu --python {hosts.python} --ssh "-F {hosts.config}"',
                cell.source,
            )
        execute(notebook, tmp_path_factory.mktemp("two_hosts"))
        for name in hosts.names:
            assert hosts.left(name) == []
            assert list(hosts.temporary(name).glob("dtkit-*")) == []
    return notebook


@pytest.mark.timeout(600)
def test_the_hosts_were_looked_at_before_anything_was_started(two_hosts: NotebookNode) -> None:
    text = printed(two_hosts, "check")
    assert "these hosts can train together" in text
    assert re.search(r"host-a +host-b \([\d.]+\) +[\d.]+ ms +[\d,]+ Mbit/s", text)


def test_ranks_are_numbered_host_by_host(two_hosts: NotebookNode) -> None:
    assert "3 ranks on CPU of 2 hosts over gloo" in printed(two_hosts, "init")
    text = printed(two_hosts, "hosts")
    for place in ("('host-a', 0, 0)", "('host-a', 1, 1)", "('host-b', 2, 0)"):
        assert place in text


def test_a_rank_on_the_other_host_comes_back_with_its_state(two_hosts: NotebookNode) -> None:
    assert "its engine on host-b was killed by SIGKILL" in error_of(two_hosts, "kill")
    assert "rank 2: new engine with the" in printed(two_hosts, "restart")
    found = re.findall(r"(host-[ab]): (0\.\d+)", printed(two_hosts, "again"))
    assert {host for host, _ in found} == {"host-a", "host-b"}
    assert len({accuracy for _, accuracy in found}) == 1
    assert float(found[0][1]) > 0.8


def test_the_model_is_here_in_the_end(two_hosts: NotebookNode) -> None:
    assert "Linear(in_features=64, out_features=128" in printed(two_hosts, "pull")
    assert "ended: 3 ranks" in printed(two_hosts, "shutdown")
