"""How many steps a run will make, read from the loops around its first step."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["estimate_iterations"]

_THROUGH = {"enumerate", "tqdm", "reversed", "sorted", "list", "iter"}
"""Calls that yield as many items as their first argument."""
_PURE = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator,
         ast.unaryop, ast.expr_context, ast.Subscript)  # fmt: skip


def estimate_iterations(frame: FrameType | None) -> int | None:
    """Return how often the innermost loop around `frame` will run in all, None if unknown.

    Multiplies the trip counts of all `for` loops that enclose the frame and its
    callers in the user's own code. A `while` loop, or an iterable without a
    length, makes it unknown. Nothing is called to find out, except `len`.
    """
    total, num_loops = 1, 0
    while frame is not None:
        if _is_users(frame):
            for loop in _loops_around(frame):
                trips = _trips(loop.iter, frame) if isinstance(loop, ast.For) else None
                if trips is None:
                    return None
                total *= trips
                num_loops += 1
            if frame.f_code.co_name == "<module>":
                break
        frame = frame.f_back
    return total if num_loops else None


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    is_library = name.startswith((sys.prefix, sys.base_prefix)) or "/dtkit/engine/" in name
    return not is_library and not name.startswith("<frozen") and bool(linecache.getline(name, 1))


def _loops_around(frame: FrameType) -> list[ast.For | ast.While]:
    """Return the loops of the frame's own function that contain its line, outermost first."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:  # a file that is not the source that runs
        return []
    line, scope = frame.f_lineno, _scope(tree, frame)
    found = [
        node
        for node in _own_nodes(scope)
        if isinstance(node, ast.For | ast.While)
        and node.lineno < line <= (node.end_lineno or node.lineno)
    ]
    return sorted(found, key=lambda node: node.lineno)


def _scope(tree: ast.Module, frame: FrameType) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name == frame.f_code.co_name
            and node.lineno <= frame.f_lineno <= (node.end_lineno or 0)
        ):
            return node
    return tree


def _own_nodes(scope: ast.AST) -> list[ast.AST]:
    """Return the nodes below `scope` that do not belong to a function inside it."""
    nodes = []
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += [child, *_own_nodes(child)]
    return nodes


def _trips(node: ast.expr, frame: FrameType) -> int | None:
    if isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        if name in ("range", "trange"):
            bounds = [_value(arg, frame) for arg in node.args]
            return len(range(*bounds)) if all(isinstance(b, int) for b in bounds) else None
        if name == "zip":
            counts = [_trips(arg, frame) for arg in node.args]
            return None if None in counts else min(c for c in counts if c is not None)
        return _trips(node.args[0], frame) if name in _THROUGH else None
    value = _value(node, frame)
    try:
        return len(value) if isinstance(value, Sized) else None
    except (TypeError, NotImplementedError):  # an IterableDataset without a length
        return None


def _value(node: ast.expr, frame: FrameType) -> Any:
    """Evaluate an expression of names, attributes, items, numbers and `len` in the frame."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
        return _trips(node.args[0], frame)
    if isinstance(node, ast.List | ast.Tuple):
        return node.elts
    if not all(isinstance(n, _PURE) for n in ast.walk(node)):
        return None
    code = compile(ast.Expression(body=node), "<dtkit>", "eval")
    try:
        return eval(code, frame.f_globals, frame.f_locals)  # noqa: S307  the user's own names
    except Exception:  # noqa: BLE001  the loop's names may be gone: then it is unknown
        return None
