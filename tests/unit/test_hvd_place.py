"""What the launchers' environments are read as."""

from __future__ import annotations

import pytest

from dtkit.errors import InvalidInputError
from dtkit.horovod.place import ALONE, place_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "1"}  # fmt: skip
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
          "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
          "PMIX_NAMESPACE": "prterun-h-1@1"}  # fmt: skip
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}  # fmt: skip
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0",
              "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_RANK": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("torchrun", 3, 4, 1, "1")),
        (MPIRUN, ("mpirun", 1, 4, 2, None)),
        (SRUN, ("srun", 2, 4, 0, "1")),
        (HOROVODRUN, ("horovodrun", 0, 2, 0, "0")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("mpiexec", 1, 2, None, None)),
    ],
)
def test_each_launcher_says_where_a_rank_is(
    environment: dict[str, str], expected: tuple[str, int, int, int | None, str | None]
) -> None:
    place = place_of(environment)
    # The local rank is what the launcher says, never made of the rank.
    found = (place.launcher, place.rank, place.size, place.local_rank, place.node)
    assert found == expected


def test_the_innermost_launcher_counts() -> None:
    assert place_of({**SRUN, **MPIRUN, **TORCHRUN}).launcher == "torchrun"
    assert place_of({**SRUN, **MPIRUN}).launcher == "mpirun"


def test_a_job_is_known_by_what_all_its_ranks_share() -> None:
    assert place_of(MPIRUN).job == "prterun-h-1@1"
    assert place_of(SRUN).job == "7-0"


def test_without_a_launcher_there_is_one_rank() -> None:
    assert place_of({"HOME": "/root", "LOCAL_RANK": "3"}) == ALONE


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is no rank of WORLD_SIZE=4"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one', set by torchrun, is not a number"),
    ],
)
def test_variables_that_cannot_be_are_named(environment: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        place_of(environment)
