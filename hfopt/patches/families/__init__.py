"""Families of decoders that hfopt knows whole, each a record."""

from collections.abc import Iterator

from torch import nn

from hfopt.patches.families.family import Family
from hfopt.patches.families.gptj import GPTJ
from hfopt.patches.families.granite import GRANITE
from hfopt.patches.families.llama import LLAMA
from hfopt.patches.families.opt import OPT
from hfopt.patches.families.phi3 import PHI3
from hfopt.patches.families.qwen3 import QWEN3

FAMILIES = (LLAMA, QWEN3, PHI3, GRANITE, GPTJ, OPT)


def families_of(model: nn.Module) -> Iterator[Family]:
    """Records to try on this model: those that name its type, in order."""
    types = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    return (family for family in FAMILIES if types & set(family.model_types))
