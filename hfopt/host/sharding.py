"""Tensor parallelism of transformers: how it has split the layers of a model over processes."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

# number of a layer -> what plans write in its place
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Split(NamedTuple):
    """How a weight [out, in] is split. axis: 0 outputs, 1 inputs. whole: whether modules around it see all outputs, or give
    it all inputs, and not the part of this process alone.
    """

    axis: int
    whole: bool


# names that plans have for it; None: each process has all of the weights
_LINEARS = {
    "colwise": Split(0, False),
    "colwise_gather_output": Split(0, True),
    "colwise_rep": Split(0, True),
    "rowwise": Split(1, False),
    "rowwise_split_input": Split(1, True),
    "rowwise_rep": Split(1, True),
}
_KEYS = ("k_proj", "qkv_proj", "query_key_value")  # linear layers that make the heads of keys
_EMBEDDINGS = {"embedding_rowwise": Split(0, True)}
_WHOLE = frozenset({"replicated_with_grad_allreduce", "replicate"})


class Sharding(NamedTuple):
    """What is split. group: of the processes. splits: of modules by path; None where each process has the whole."""

    group: Any
    splits: dict[str, Split | None]


def is_sharded(tensor: Any) -> bool:
    """Whether transformers has given this process a part of the tensor, or says so of the whole."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_part(tensor: Any) -> torch.Tensor:
    """The part of this process, in the memory where it is."""
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()
    return part


def sharding_of(model: nn.Module) -> Sharding | str | None:
    """How transformers has split this model; None if it has not; in words, what is split in a way that nobody knows here."""
    sharded = dict(_sharded(model))
    if not sharded:
        return None
    plan, splits = getattr(model, "tp_plan", None) or {}, dict[str, Split | None]()
    for path, module in model.named_modules():
        if "forward" not in module.__dict__ and path not in sharded:
            continue
        style = plan.get(_NUMBER.sub("*", path))
        styles = _LINEARS if isinstance(module, nn.Linear) else _EMBEDDINGS
        if style in _WHOLE and path not in sharded:
            splits[path] = None
        elif style in styles and isinstance(module, nn.Linear | nn.Embedding):
            splits[path] = styles[style]
        else:
            return f"{path} is split by {style!r}, which is not known here"
    meshes = {weight.device_mesh for weights in sharded.values() for weight in weights}
    if len(meshes) > 1 or (mesh := meshes.pop()).ndim != 1:
        return "its weights are split in several ways"
    return Sharding(mesh.get_group(), splits)


def split_options(plan: dict[str, str] | None, n: int) -> dict[str, Any] | None:
    """Arguments of `from_pretrained` that split a model over n processes; None if this release has none.

    plan: None for that of the model's class.
    """
    if "tp_plan" not in inspect.signature(DistributedConfig).parameters:
        return None
    rules: Any = "auto" if plan is None else plan
    return {"distributed_config": DistributedConfig(tp_size=n, tp_plan=rules)}


def can_split(model: Any, n: int) -> bool:
    """Whether transformers has a plan for the class of a model that gives each of n processes whole heads."""
    plan, config = getattr(model, "tp_plan", None), model.config.get_text_config(decoder=True)
    if not plan:
        return False
    names = "num_attention_heads", "num_key_value_heads"
    splits_heads = any(style == "colwise" and path.endswith(_KEYS) for path, style in plan.items())
    return not splits_heads or all((getattr(config, name, None) or 0) % n == 0 for name in names)


def keeps_step(model: Any) -> bool:
    """Whether processes beside this one have parts of the model, or gather its weights for each call: they have to make as
    many calls as this one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return (
        is_deepspeed_zero3_enabled()
        or is_fsdp_managed_module(model)
        or any(map(is_sharded, model.parameters()))
    )


def _sharded(model: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    for path, module in model.named_modules():
        found = [each for each in module._parameters.values() if is_sharded(each)]
        if found:
            yield path, found
