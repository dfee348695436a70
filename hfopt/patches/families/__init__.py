"""Decoders whose every part is known: where their layers are, and which pattern each part has to match."""

from torch import nn

from hfopt.patches.families.family import Family
from hfopt.patches.families.gptj import GPTJ
from hfopt.patches.families.llama import LLAMA
from hfopt.patches.families.opt import OPT

FAMILIES = (LLAMA, GPTJ, OPT)


def family_of(model: nn.Module) -> Family | None:
    """The record of the decoder in this model, or None if it has none."""
    for module in model.modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type is not None:
            return next((family for family in FAMILIES if model_type in family.model_types), None)
    return None
