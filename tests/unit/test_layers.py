"""The layers of the package as one table, and the proof that every module keeps to them."""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

BASE = (
    "dtkit.alarm",
    "dtkit.errors",
    "dtkit.checkpoint_files",
    "dtkit.packing",
    "dtkit.chunks",
    "dtkit._ranks",
    "dtkit._spec",
    "dtkit.compression",
    "dtkit.strategy",
    "dtkit.events",
    "dtkit.output",
    "dtkit.batchsize",
    "dtkit.options",
    "dtkit.recipe",
    "dtkit.export",
    "dtkit.launch",
    "dtkit.livecontrol",
    "dtkit.values",
    "dtkit._format",
    "dtkit._where",
)
VIEW = (
    "dtkit.views.alt",
    "dtkit.views.axis",
    "dtkit.views.celltext",
    "dtkit.views.chart",
    "dtkit.views.comparison",
    "dtkit.views.controls",
    "dtkit.views.gantt",
    "dtkit.views.guarded",
    "dtkit.views.live",
    "dtkit.views.look",
    "dtkit.views.pace",
    "dtkit.views.panel",
    "dtkit.views.picture",
    "dtkit.views.plot",
    "dtkit.views.render",
    "dtkit.views.runstable",
    "dtkit.views.staleness",
    "dtkit.views.steering",
    "dtkit.views.summary",
    "dtkit.views.sweeptable",
    "dtkit.views.sweepview",
    "dtkit.views.terminal",
    "dtkit.views.trialboard",
    "dtkit.views.tuneview",
    "dtkit.views.dashboard",
    "dtkit.views.words",
    "dtkit.views.zoom",
)
MAY_VIEW = (*VIEW, "dtkit.telemetry", "numpy", *BASE)
MAY_DISPLAY = ("ipywidgets", "IPython.display", "IPython.core.getipython", *MAY_VIEW)
MAY_DRIVE = (
    "dtkit.cluster",
    "dtkit.guard",
    "dtkit.telemetry",
    "dtkit.views.dashboard",
    "dtkit.tensorboard",
    "dtkit.trace",
    "dtkit.views.comparison",
    "dtkit.views.gantt",
    "dtkit.views.runstable",
    "dtkit.views.summary",
    "dtkit.views.sweeptable",
    "dtkit.views.sweepview",
    "dtkit.views.tuneview",
    "dtkit.views.zoom",
    "numpy",
    "psutil",  # whether the kernel that drove a run is alive, and the free memory
    *BASE,
)

# Which names a module may import besides the standard library and modules under its own key; the
# longest key that fits counts, and "dtkit" itself fits only the package's face. A package's name
# stands for everything in it. ipyparallel, torch, ipywidgets and matplotlib each have one home.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "dtkit": BASE,
    **dict.fromkeys(BASE, BASE),
    "dtkit.telemetry": ("numpy", *BASE),
    "dtkit.trace": ("numpy", *BASE),
    "dtkit.tensorboard": ("tensorboard", "dtkit.telemetry", "numpy", *BASE),
    "dtkit.views": (),
    "dtkit.views.alt": MAY_VIEW,
    "dtkit.views.axis": ("matplotlib", *MAY_VIEW),
    "dtkit.views.chart": ("matplotlib", "PIL", *MAY_VIEW),
    "dtkit.views.comparison": ("matplotlib", *MAY_VIEW),
    "dtkit.views.celltext": MAY_DISPLAY,
    "dtkit.views.controls": MAY_VIEW,
    "dtkit.views.gantt": ("matplotlib", "dtkit.trace", *MAY_VIEW),
    "dtkit.views.guarded": MAY_VIEW,
    "dtkit.views.render": MAY_VIEW,
    "dtkit.views.runstable": MAY_VIEW,
    "dtkit.views.steering": ("ipywidgets", *MAY_VIEW),
    "dtkit.views.summary": MAY_VIEW,
    "dtkit.views.sweeptable": MAY_VIEW,
    "dtkit.views.sweepview": ("matplotlib", *MAY_VIEW),
    "dtkit.views.trialboard": MAY_DISPLAY,
    "dtkit.views.tuneview": ("matplotlib", *MAY_VIEW),
    "dtkit.views.terminal": MAY_VIEW,
    "dtkit.views.dashboard": MAY_DISPLAY,
    "dtkit.views.live": ("anywidget", "traitlets", *MAY_VIEW),
    "dtkit.views.pace": (),
    "dtkit.views.staleness": MAY_VIEW,
    "dtkit.views.words": MAY_VIEW,
    "dtkit.views.panel": MAY_DISPLAY,
    "dtkit.views.look": MAY_VIEW,
    "dtkit.views.plot": ("matplotlib", *MAY_VIEW),
    "dtkit.views.picture": ("ipywidgets", *MAY_VIEW),
    "dtkit.views.zoom": ("anywidget", "traitlets", "dtkit.trace", *MAY_VIEW),
    # IPython's profile folders belong to the interface of ipyparallel's launchers, and what its
    # client logs goes to the kernel's own log, which traitlets knows.
    "dtkit.cluster": (
        "ipyparallel",
        "traitlets.log",
        "psutil",
        "zmq",
        "IPython.core.profiledir",
        "IPython.paths",
        "dtkit.guard",
        *BASE,
    ),
    # A process of its own watches a session: it must stay small.
    "dtkit.guard": ("psutil",),
    "dtkit.driver": MAY_DRIVE,
    "dtkit.magics": (
        "dtkit.driver",
        "dtkit.tensorboard",
        "dtkit.views.dashboard",
        "dtkit.views.guarded",
        "dtkit.views.celltext",
        "dtkit.views.trialboard",
        "IPython",
        "ipykernel",  # its version decides whether buttons are served
        "traitlets",  # the settings that %config lists
        *BASE,
    ),
    # Horovod's interface: on engines, and in scripts that a launcher starts.
    "dtkit.horovod": (
        "torch",
        "cloudpickle",
        "dtkit.compression",
        "dtkit.engine.reduce",
        "dtkit.engine.parts",
        "dtkit.errors",
    ),
    # A script that %dist_export wrote imports it: engine and run in one process.
    "dtkit.script": ("torch", "dtkit.engine", "dtkit.horovod", "dtkit.driver.runs", *BASE),
    # Starts ranks; imports no torch, so that it answers at once.
    "dtkit.horovod.launch": (
        "cloudpickle",
        "dtkit.horovod.world",
        "dtkit.horovod.errors",
        "dtkit.errors",
    ),
    # Runs on the engines; the driver names it by string.
    "dtkit.engine": (
        "torch",
        "numpy",
        "psutil",
        "cloudpickle",
        "IPython",
        "dtkit._format",
        "dtkit._ranks",
        "dtkit.checkpoint_files",
        "dtkit.packing",
        "dtkit.chunks",
        "dtkit.compression",
        "dtkit.strategy",
        "dtkit.horovod.alias",  # engines import Horovod's interface by Horovod's name
        "dtkit.errors",
        "dtkit.events",
        "dtkit.guard",
        "dtkit.livecontrol",
        "dtkit.recipe",
        "dtkit.trace",  # the rows that it writes
    ),
}

# Allowed inside functions and for type checkers only, never when the module is imported.
MAY_IMPORT_LAZILY: dict[str, tuple[str, ...]] = {
    "dtkit": (
        "dtkit.driver",
        "dtkit.magics",
        "dtkit.engine.checkpointing.face",
        "dtkit.engine.livecontrols",
        "dtkit.engine.log",
        "dtkit.engine.parallel",
        "IPython",
    ),
    "dtkit.horovod.launch": (
        "dtkit.driver.session",
        "horovod",
        "torch",
    ),  # horovodrun may be Horovod's
    "dtkit.horovod": (
        "dtkit.engine.process.agent",
        "dtkit.engine.process.group",
        "dtkit.engine.run",
    ),  # in a process that is an engine
    "dtkit.chunks": ("numpy", "torch"),  # what is carried may be tensors
    "dtkit.packing": ("cloudpickle", "numpy", "torch"),  # what is carried may be tensors
    "dtkit.engine": ("pynvml", "tqdm"),  # optional: how busy a GPU is; the cell's own bars
    "dtkit.driver": ("pandas",),  # optional: Sweep.to_pandas
    "dtkit.telemetry": ("pandas",),  # optional: History.to_pandas
}

OPTIONAL = {
    "horovod",
    "pandas",
    "pynvml",
    "tqdm",
}  # imported where it is asked for; a plain install lacks it

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12

# "path" or "path:function" -> why it is longer. An entry that is not needed fails.
LONGER: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name; `names` are the readings of it, for `from x import y` x and x.y."""

    line: int
    names: tuple[str, ...]
    is_lazy: bool

    @property
    def top(self) -> str:
        """The package that the name is looked up in."""
        return self.names[0].split(".")[0]


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Yield every import of a module, however deep it is nested."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, is_lazy = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, (alias.name,), is_lazy)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, (origin, f"{origin}.{alias.name}"), is_lazy)
        is_lazy = is_lazy or defers(node)
        pending += [(child, is_lazy) for child in ast.iter_child_nodes(node)]


def defers(node: ast.AST) -> bool:
    """Whether what the node holds is not run when the module is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(module: str) -> str | None:
    """Return the key of `MAY_IMPORT` that the module falls under."""
    keys = [k for k in MAY_IMPORT if (module == k if k == "dtkit" else is_within(module, k))]
    return max(keys, key=len, default=None)


def illegal_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    layer = layer_of(module)
    if layer is None:
        return [f"{module} is in no layer: give it a line in MAY_IMPORT"]
    always = () if layer == "dtkit" else (layer,)
    legal = (*always, *MAY_IMPORT[layer])
    lazily = (*legal, *MAY_IMPORT_LAZILY.get(layer, ()))
    return [
        f"{module}:{found.line} imports {found.names[-1]}, which {layer} may not: see MAY_IMPORT"
        for found in imports_of(source, module, is_package=is_package)
        if found.top not in sys.stdlib_module_names
        and not any(
            is_within(name, ok)
            for name in found.names
            for ok in (lazily if found.is_lazy else legal)
        )
    ]


def too_long(source: str, path: str) -> Iterator[str]:
    """Yield "path" and "path:function" for what is longer than it may be."""
    if len(source.splitlines()) > MAX_MODULE_LINES:
        yield path
    for name, num_lines in function_lengths(source):
        if num_lines > MAX_FUNCTION_LINES:
            yield f"{path}:{name}"


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def modules() -> dict[str, Path]:
    """Return the package's modules by dotted name."""
    paths = sorted((ROOT / "dtkit").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


MODULES = {name.removesuffix(".__init__"): path for name, path in modules().items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_layers(module: str) -> None:
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    illegal = illegal_imports(path.read_text(), module, is_package=is_package)
    assert not illegal, "\n".join(illegal)


def test_every_line_of_the_table_is_used() -> None:
    assert set(MAY_IMPORT) - {layer_of(module) for module in MODULES} == set()


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {re.split(r"\W*[<>=]", r)[0] for r in [*project["dependencies"], *extras["live"]]}
    imported = {
        found.top
        for module, path in MODULES.items()
        for found in imports_of(path.read_text(), module)
    }
    foreign = imported - set(sys.stdlib_module_names) - OPTIONAL - {"", "dtkit"}
    distributions = packages_distributions()
    undeclared = {top for top in foreign if not declared & set(distributions.get(top, [top]))}
    assert undeclared == set()


def test_modules_and_functions_are_short() -> None:
    long = {
        entry
        for path in MODULES.values()
        for entry in too_long(path.read_text(), str(path.relative_to(ROOT)))
    }
    assert long - set(LONGER) == set(), "split it, or give the reason in LONGER"
    assert set(LONGER) - long == set(), "no longer too long: remove it from LONGER"


def test_most_functions_are_very_short() -> None:
    lengths = [n for path in MODULES.values() for _, n in function_lengths(path.read_text())]
    assert statistics.median(lengths) < MAX_MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("dtkit.driver.session", "import torch", id="torch-in-the-driver"),
        pytest.param(
            "dtkit.driver.session",
            "from dtkit.engine.run import begin",
            id="engine-by-name",
        ),
        pytest.param("dtkit.driver.session", "from dtkit import engine", id="engine-from-the-root"),
        pytest.param(
            "dtkit.driver.session", "def f():\n    import ipyparallel as ipp", id="in-a-function"
        ),
        pytest.param(
            "dtkit.telemetry.state",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dtkit.views.dashboard",
            id="for-the-type-checker",
        ),
        pytest.param(
            "dtkit.engine.run", "from dtkit.driver.session import Session", id="engine-up"
        ),
        pytest.param("dtkit.engine.run", "from ..telemetry import state", id="relative"),
        pytest.param("dtkit.engine.reduce.sync", "from ... import dashboard", id="relative-root"),
        pytest.param("dtkit.events", "import numpy", id="base-is-standard-library"),
        pytest.param("dtkit._format", "import dtkit.telemetry.view", id="base-knows-no-run"),
        pytest.param("dtkit.views.dashboard", "import IPython", id="only-a-part-of-IPython"),
        pytest.param("dtkit.views.render", "import matplotlib.figure", id="matplotlib-elsewhere"),
        pytest.param("dtkit.magics.train", "from dtkit.cluster import Engines", id="two-down"),
        pytest.param("dtkit", "from dtkit.driver.session import Session", id="face-eagerly"),
        pytest.param("dtkit.novelty", "", id="module-in-no-layer"),
    ],
)
def test_an_illegal_import_is_found(module: str, source: str) -> None:
    assert len(illegal_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dtkit.engine.process.group", "import torch.distributed as dist\nfrom torch import nn"),
        (
            "dtkit.engine.process.group",
            "from ..reduce import sync\nfrom dtkit.engine import reduce",
        ),
        ("dtkit.telemetry.state", "import json, numpy as np\nfrom dtkit import events"),
        ("dtkit", "def load_ipython_extension(ip):\n    from dtkit.magics import register"),
        (
            "dtkit.views.dashboard",
            "from IPython.display import display\nfrom IPython import display",
        ),
    ],
)
def test_a_legal_import_passes(module: str, source: str) -> None:
    assert illegal_imports(source, module) == []


def test_a_long_module_and_a_long_function_are_found() -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    module = function + "x = 1\n" * MAX_MODULE_LINES
    assert list(too_long(function, "m.py")) == ["m.py:f"]
    assert list(too_long(module, "m.py")) == ["m.py", "m.py:f"]
