"""Which layers of a model are divided over ranks, how, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from dtkit.engine.parallel.attention import why_not_divided

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Choice", "choose", "shared_layers"]

# Any, below: attributes of the user's modules.


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a module.

    Attributes:
        path: its name in the model; "" is the model.
        style: `colwise` (each rank has some outputs), `rowwise` (some inputs), `fused:N`
            (colwise, of N layers in one), `heads`, or `whole` (left on every rank).
        why: in words.
        region: the name of the module in whose forward pass tensors are divided.
        has_several: whether several divided layers of the region take the same tensor.
    """

    path: str
    style: str
    why: str
    region: str = ""
    has_several: bool = False


_QUERY, _KEY, _VALUE = (
    re.compile(rf"^(to_?|w_?|c_?|linear_?|lin_?)?({words})(_?(proj|projection|lin|linear|layer))?$")
    for words in ("q|query|queries", "k|key|keys", "v|value|values")
)
_FUSED = re.compile(r"^(c_attn|in_proj|query_key_value|(to_?|w_?|c_?)?qkv(_?(proj|linear))?)$")
_OUTPUT = re.compile(
    r"^(to_?|w_?|c_?)?(o|out|output|proj|projection|dense)(_?(proj|projection|lin|linear|layer))?$"
)
_MLPS = [
    (("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"), (("fc1", "fc2"), "fc3"),
    (("wi_0", "wi_1"), "wo"), (("gate", "up"), "down"), (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"), (("c_fc",), "c_proj"), (("fc1",), "fc2"), (("fc",), "proj"),
    (("linear1",), "linear2"), (("lin1",), "lin2"), (("fc_in",), "fc_out"), (("wi",), "wo"),
    (("w1",), "w2"), (("up",), "down"), (("dense_h_to_4h",), "dense_4h_to_h"),
]  # fmt: skip
"""What the layers of a hand-written MLP are called: those that widen, and the one that narrows."""
_HEADS = ("n_head", "n_heads", "num_heads", "nhead", "heads", "num_attention_heads", "h")
_KV_HEADS = ("n_kv_head", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "n_kv")
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU,
    nn.CELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid,
    nn.Dropout, nn.Identity,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Group:
    """Linear layers of a module that belong together; `reason`: why they are left whole."""

    names: list[str]
    styles: list[str]
    why: str
    reason: str = ""


def choose(model: nn.Module, num_ranks: int) -> list[Choice]:
    """Return what becomes of each module of a model that has parameters of its own."""
    return list(_Chooser(model, num_ranks).visit(model, ""))


def shared_layers(model: nn.Module) -> set[str]:
    """Return the names of the modules whose weights are those of another module, too."""
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {
        path for path, module in model.named_modules()
        if any(uses[id(p)] > 1 for p in module.parameters(recurse=False))
    }  # fmt: skip


class _Chooser:
    def __init__(self, model: nn.Module, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._shared = shared_layers(model)

    def visit(self, module: nn.Module, path: str) -> Iterator[Choice]:
        """Yield the choices for a module and what is in it."""
        if type(module) is nn.MultiheadAttention:
            reason = why_not_divided(module, self._num_ranks) or self._why_shared(path)
            why = f"attention, {module.num_heads} heads"
            yield Choice(path, "whole" if reason else "heads", reason or why, path)
            return
        taken: dict[str, Choice] = {}
        for group in self._groups(module, path):
            reason = group.reason or self._why_not(module, path, group)
            several = sum(style != "rowwise" for style in group.styles) > 1
            for name, style in zip(group.names, group.styles, strict=True):
                taken[name] = (
                    Choice(_join(path, name), "whole", f"{group.why}, but {reason}") if reason
                    else Choice(_join(path, name), style, group.why, path, several)
                )  # fmt: skip
        if any(True for _ in module.parameters(recurse=False)):
            yield Choice(path, "whole", _REASONS.get(type(module).__name__, ""))
        for name, child in module.named_children():
            if name in taken:
                yield taken[name]
            else:
                yield from self.visit(child, _join(path, name))

    def _groups(self, module: nn.Module, path: str) -> Iterator[_Group]:
        if isinstance(module, nn.Sequential):
            yield from self._in_a_row(module, path)
            return
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        attention = self._attention(module, linears)
        used = attention.names if attention is not None else []
        found = (attention, _mlp({n: m for n, m in linears.items() if n not in used}))
        yield from (group for group in found if group is not None)

    def _in_a_row(self, module: nn.Sequential, path: str) -> Iterator[_Group]:
        first = ""
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                group = _Group([first, name], ["colwise", "rowwise"], "two layers in a row")
                if first and not self._why_not(module, path, group):
                    yield group
                    first = ""
                else:
                    first = name
            elif not isinstance(layer, _ELEMENTWISE):
                first = ""

    def _attention(self, module: nn.Module, linears: dict[str, nn.Linear]) -> _Group | None:
        output, fused = _named(linears, _OUTPUT), _named(linears, _FUSED)
        three = [_named(linears, pattern) for pattern in (_QUERY, _KEY, _VALUE)]
        heads, kv_heads = _attribute(module, _HEADS), _attribute(module, _KV_HEADS)
        if output and fused:
            names, styles = [fused, output], ["fused:3", "rowwise"]
            is_even = linears[fused].out_features == 3 * linears[output].in_features
        elif output and all(three):
            names, styles = [*three, output], ["colwise"] * 3 + ["rowwise"]
            is_even = linears[three[1]].out_features == linears[output].in_features
        else:
            return None
        reason = ""
        if heads is None:
            reason = f"it does not say how many heads it has ({', '.join(_HEADS)})"
        elif heads % self._num_ranks:
            reason = f"{self._num_ranks} ranks do not divide {heads} heads"
        elif fused and not is_even:
            reason = "q, k and v are of different widths in one layer"
        elif not is_even and kv_heads is None:
            reason = f"it does not say for how many heads k and v are ({', '.join(_KV_HEADS)})"
        elif not is_even and kv_heads is not None and kv_heads % self._num_ranks:
            reason = f"{self._num_ranks} ranks do not divide {kv_heads} heads of k and v"
        return _Group(names, styles, f"attention, {heads} heads" if heads else "attention", reason)

    def _why_not(self, module: nn.Module, path: str, group: _Group) -> str:
        """Return why layers are left whole; empty: they can be divided."""
        for name, style in zip(group.names, group.styles, strict=True):
            layer: Any = module.get_submodule(name)
            size = layer.in_features if style == "rowwise" else layer.out_features
            parts = int(style.partition(":")[2] or 1)
            if size % (parts * self._num_ranks):
                return f"{self._num_ranks} ranks do not divide {size // parts}"
            if type(layer) is not nn.Linear:
                return f"{type(layer).__name__} is not nn.Linear"
            if self._why_shared(_join(path, name)):
                return self._why_shared(_join(path, name))
        return ""

    def _why_shared(self, path: str) -> str:
        return "it shares its weights with another layer" if path in self._shared else ""


def _mlp(linears: dict[str, nn.Linear]) -> _Group | None:
    for ups, down in _MLPS:
        if down not in linears or not all(up in linears for up in ups):
            continue
        wide = linears[down].in_features
        widths = {linears[up].out_features for up in ups}
        num = 2 if len(ups) == 1 and widths == {2 * wide} else 1
        if widths == {num * wide} and len({linears[up].in_features for up in ups}) == 1:
            style = "fused:2" if num > 1 else "colwise"
            return _Group([*ups, down], [style] * len(ups) + ["rowwise"], "MLP")
    return None


_REASONS = {
    "Linear": "neither attention nor an MLP that the plan knows",
    "Embedding": "only plan= divides it",
    "Conv1D": "its weight is transposed; nn.Linear is divided",
}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(linears: dict[str, nn.Linear], pattern: re.Pattern[str]) -> str:
    found = [name for name in linears if pattern.match(name.lower())]
    return found[0] if len(found) == 1 else ""


def _attribute(module: nn.Module, names: Sequence[str]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None
