"""pyproject.toml, constraints.txt, environment.yml and CHANGELOG.md agree with each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dtkit

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["live"]]
]
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())


def read_constraints() -> dict[str, Version]:
    """Return the pinned version of each package; a line that pins nothing is an error."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): exact_version(pin.specifier) for pin in pins}


def exact_version(specifier: SpecifierSet) -> Version:
    (only,) = specifier
    assert only.operator == "==", f"{only} is not a pin"
    return Version(only.version)


def conda_pip_lines() -> list[str]:
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    return list(pip)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pins = read_constraints()
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_pinned_versions_are_installed(requirement: Requirement) -> None:
    pinned = read_constraints()[canonicalize_name(requirement.name)]
    assert Version(version(requirement.name)).public == pinned.public


def test_no_pin_names_one_build_of_a_package() -> None:
    assert {name for name, pin in read_constraints().items() if pin.local} == set()


def test_conda_installs_the_same_packages_through_pip() -> None:
    assert conda_pip_lines() == [
        "--constraint constraints.txt",
        f"--editable .[{','.join(sorted(EXTRAS.keys() - {'gpu'}))}]",  # for who has one
    ]


def test_conda_and_pip_do_not_share_a_package() -> None:
    conda = {re.split(r"[=<>]", e)[0] for e in CONDA["dependencies"] if isinstance(e, str)}
    assert {"python", "pip"} <= conda
    assert conda & {canonicalize_name(requirement.name) for requirement in REQUIREMENTS} == set()


def test_conda_takes_the_oldest_supported_python() -> None:
    (conda,) = [e for e in CONDA["dependencies"] if str(e).startswith("python=")]
    assert PROJECT["requires-python"] == f">={conda.removeprefix('python=')}"


def test_the_changelog_has_a_section_for_what_comes_next() -> None:
    sections = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert sections[1:2] in ([], [PROJECT["version"]])


def test_the_package_has_the_projects_version() -> None:
    assert dtkit.__version__ == version("dtkit") == PROJECT["version"]
