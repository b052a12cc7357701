"""Which folders are whole checkpoints, and which of them a name means."""

import json
from pathlib import Path

import pytest

from dtkit.checkpoint_files import (
    FOLDER,
    Manifest,
    free_name,
    locate,
    newest,
    prune,
    publish,
    whole,
)
from dtkit.errors import InvalidInputError
from dtkit.options import RunOptions


def write(folder: Path, step: int, time_unix_s: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / free_name(folder, step)
    temporary = folder / f".{final.name}"
    temporary.mkdir()
    (temporary / "rank-0.pt").write_bytes(b"12345")
    publish(
        temporary, final,
        Manifest(step=step, epoch=0, world_size=1, names=["model"], files={"rank-0.pt": 5},
                 time_unix_s=time_unix_s),
    )  # fmt: skip
    return final


def test_what_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    first, cut, lacking = (write(tmp_path, step) for step in (1, 2, 3))
    (cut / "rank-0.pt").write_bytes(b"1234")
    (lacking / "rank-0.pt").unlink()
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / ".step-00000005").mkdir()
    odd = tmp_path / "step-00000006"
    odd.mkdir()
    (odd / "checkpoint.json").write_text(json.dumps({"step": 6}))
    assert whole(tmp_path) == [first]


def test_steps_are_in_order_and_the_newest_stay(tmp_path: Path) -> None:
    written = [write(tmp_path, step) for step in (9, 10, 10, 100_000_000)]
    assert [path.name for path in written][1:3] == ["step-00000010", "step-00000010.2"]
    assert whole(tmp_path) == written
    prune(tmp_path, 2)
    assert whole(tmp_path) == written[2:] == sorted(tmp_path.iterdir(), key=str)


def test_what_was_moved_elsewhere_stays_there(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    first, second = write(folder, 1), write(folder, 2)
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    prune(folder, 1)
    assert list(folder.iterdir()) == [second]
    assert whole(tmp_path) == []
    assert newest(elsewhere) == elsewhere


def test_a_name_a_path_or_the_last(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / FOLDER, 5, time_unix_s=2.0)
    two = write(tmp_path / "two" / FOLDER, 9, time_unix_s=1.0)
    (tmp_path / "empty" / FOLDER).mkdir(parents=True)
    assert locate(tmp_path, "two") == two
    assert locate(tmp_path, "last") == one
    for path in (two, two.parent, two.parent.parent):
        assert locate(tmp_path, str(path)) == two
        assert newest(path) == two
    with pytest.raises(InvalidInputError, match=r"--resume empty: .*runs with one: one, two"):
        locate(tmp_path, "empty")
    with pytest.raises(InvalidInputError, match=r"no run in .* has"):
        locate(tmp_path / "empty", "last")


def test_options_name_a_checkpoint_once_it_was_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "one" / FOLDER, 5)
    assert RunOptions(resume="one").located(tmp_path).resume == str(path)
    assert RunOptions().located(tmp_path) == RunOptions()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"checkpoint_every": -1}, "--checkpoint-every -1"), ({"checkpoint_keep": 0}, "keep one")],
)
def test_options_that_mean_nothing(options: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        RunOptions(**options)  # type: ignore[arg-type]
