"""Whether the template of a profile's launcher lets dtkit say what is run."""

from __future__ import annotations

import pytest
from ipyparallel.cluster.launcher import (
    HTCondorEngineSetLauncher,
    LSFEngineSetLauncher,
    PBSEngineSetLauncher,
    SGEEngineSetLauncher,
    SlurmEngineSetLauncher,
)

from dtkit.cluster.remote.profiles import check_template
from dtkit.errors import InvalidInputError

CONDOR = 'executable = {program}\narguments = "{program_args}"\ntransfer_executable = False\n'


@pytest.mark.parametrize(
    "launcher",
    [
        LSFEngineSetLauncher(),
        PBSEngineSetLauncher(),
        SGEEngineSetLauncher(),
        SlurmEngineSetLauncher(),
        HTCondorEngineSetLauncher(batch_template=CONDOR),
    ],
)
def test_these_templates_can_be_used(launcher: object) -> None:
    check_template(launcher)


@pytest.mark.parametrize(
    "launcher",
    [
        HTCondorEngineSetLauncher(),
        SlurmEngineSetLauncher(batch_template="srun ipengine --profile-dir={profile_dir}"),
    ],
)
def test_a_template_that_names_the_program_is_an_error_with_the_fix(launcher: object) -> None:
    with pytest.raises(InvalidInputError, match=r"write \{program_and_args\} in place"):
        check_template(launcher)
