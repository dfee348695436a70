"""The part of a model that generates."""

from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel


def generator_of(model: nn.Module) -> Any:
    """The outermost part that generates: the model, or the one that an adapter is wrapped around; None without one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return module if module.can_generate() else None
    return None
