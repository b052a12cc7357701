"""What is loaded is data: no code of dtkit runs what a file or a peer happens to hold."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "dtkit"

# Who reads pickles, and where they come from; the first two over ipyparallel, which checks a
# signature before.
UNPICKLES = {
    "packing.py": "%dist_pull, %dist_push: from a rank of this session, from its driver",
    "engine/checkpointing/read.py": "a checkpoint's index: by an unpickler that knows its classes",
    "engine/process/refill.py": "%dist_restart --refill: from a rank, over the session's driver",
    "horovod/torch/functions.py": "hvd.broadcast_object: from a rank of the group, as torch's own",
    "horovod/launch/function.py": "horovod.run: from its own processes, in a folder of its own",
    "horovod/launch/worker.py": "horovod.run: the call, from the process that started this one",
}
LOADERS = {"loads", "load", "Unpickler", "literal_load"}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def calls(source: str) -> list[tuple[str, str, ast.Call]]:
    """Return every call of an attribute, as owner and name: torch.load is ("torch", "load")."""
    return [
        (ast.unparse(node.func.value), node.func.attr, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def unpickled(source: str) -> bool:
    bases = [
        ast.unparse(base)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    return "pickle.Unpickler" in bases or any(
        owner in PICKLERS and name in LOADERS for owner, name, _ in calls(source)
    )


def unsafe_loads(source: str) -> list[int]:
    """Return the lines of `torch.load` that do not say `weights_only=True`."""
    return [
        call.lineno
        for owner, name, call in calls(source)
        if owner == "torch" and name == "load"
        if not any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in call.keywords
        )
    ]


def test_pickles_are_read_only_where_they_are_signed() -> None:
    found = {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if unpickled(path.read_text())
    }
    assert found == set(UNPICKLES)


def test_weights_are_loaded_as_weights_only() -> None:
    unsafe = {str(path): unsafe_loads(path.read_text()) for path in ROOT.rglob("*.py")}
    assert {path: lines for path, lines in unsafe.items() if lines} == {}


def test_the_search_is_not_blind() -> None:
    assert unpickled("import pickle\nx = pickle.loads(b)")
    assert unsafe_loads("torch.load(f)\ntorch.load(f, weights_only=False)") == [1, 2]
    assert unsafe_loads("torch.load(f, weights_only=True)") == []
