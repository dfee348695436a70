"""How to split a model over processes, from the record of its family, where transformers has no plan for it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from hfopt.patches.families import FAMILIES, families_of
from hfopt.patches.families.family import Family

# in the words of transformers' plans
_ROWS, _COLUMNS = "colwise", "rowwise"
_ROWS_GATHERED, _COLUMNS_CUT, _EMBEDDING = "colwise_gather_output", "rowwise_split_input", "embedding_rowwise"


def plan_for(model: nn.Module, *, by_rows: bool = False) -> dict[str, str] | None:
    """Of each Linear that is split, how; None for a model whose parts no record names. It may be one without weights.

    Attention works on all heads in each process, because how a model tells its heads apart may depend on how many there are.
    by_rows: each process has rows of all matrices, which lie together in a file, and all results are gathered.
    """
    known = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for family in dict.fromkeys((*families_of(model), *FAMILIES)):
        plan = dict(_rules(model, family))
        if by_rows:
            plan = {path: style if style == _EMBEDDING else _ROWS_GATHERED for path, style in plan.items()}
        layer = f"{family.decoder.path}.{family.decoder.layers}.*"
        if all(path.replace(layer, layer[:-1] + "0") in known for path in plan):
            return plan
    return None


def _rules(model: Any, family: Family) -> Iterator[tuple[str, str]]:
    decoder, layer, attention = family.decoder, family.layer, family.attention
    prefix = f"{decoder.path}.{decoder.layers}.*."
    yield f"{decoder.path}.{decoder.tokens}", _EMBEDDING
    for name in attention.inputs:
        yield f"{prefix}{layer.attention}.{name}", _ROWS_GATHERED
    yield f"{prefix}{layer.attention}.{attention.output}", _COLUMNS_CUT
    inputs: tuple[str, ...]
    if isinstance(layer.mlp, tuple):
        around, inputs, output, is_fused = "", (layer.mlp[0],), layer.mlp[2], False
    elif family.mlp is not None:
        around, inputs, output = f"{layer.mlp}.", family.mlp.inputs, family.mlp.output
        is_fused = family.mlp.is_fused
    else:
        return
    for name in inputs:
        yield f"{prefix}{around}{name}", _ROWS_GATHERED if is_fused else _ROWS
    yield f"{prefix}{around}{output}", _COLUMNS_CUT if is_fused else _COLUMNS
    head = next((name for name in decoder.heads if model._modules.get(name) is not None), None)
    if head is not None:
        yield head, _ROWS_GATHERED
