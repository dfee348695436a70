"""Families of decoders that hfopt knows whole, each a record."""

from collections.abc import Iterator

from torch import nn

from hfopt.patches.families.bloom import BLOOM
from hfopt.patches.families.codegen import CODEGEN
from hfopt.patches.families.cohere import COHERE
from hfopt.patches.families.falcon import FALCON, FALCON_40B, FALCON_ALIBI, FALCON_SEQUENTIAL
from hfopt.patches.families.family import Decoder, Family
from hfopt.patches.families.gemma import GEMMA2, HYPERCLOVA_X, VAULT_GEMMA
from hfopt.patches.families.gemma4 import GEMMA4, GEMMA4_EFFICIENT, GEMMA4_KEYS_AS_VALUES
from hfopt.patches.families.glm import GLM, GLM4
from hfopt.patches.families.gpt2 import GPT2
from hfopt.patches.families.gpt_neo import GPT_NEO
from hfopt.patches.families.gptj import GPTJ
from hfopt.patches.families.llama import LLAMA
from hfopt.patches.families.modernbert import MODERNBERT
from hfopt.patches.families.mpt import MPT
from hfopt.patches.families.neox import NEOX
from hfopt.patches.families.olmo import OLMO2
from hfopt.patches.families.opt import BART, BIGBIRD_PEGASUS, BIOGPT, BLENDERBOT_SMALL, OPT, XGLM
from hfopt.patches.families.phi import PERSIMMON, PHI
from hfopt.patches.families.phi3 import PHI3
from hfopt.patches.families.starcoder import APERTUS, NANOCHAT, NEMOTRON, STARCODER2

FAMILIES = (
    LLAMA, PHI3, GPTJ, OPT, GEMMA2, OLMO2, VAULT_GEMMA, HYPERCLOVA_X, COHERE, GLM, GLM4, PHI, PERSIMMON, NEOX, STARCODER2,
    NEMOTRON, APERTUS, NANOCHAT, CODEGEN, GPT2, XGLM, BIOGPT, FALCON, FALCON_40B, FALCON_SEQUENTIAL, FALCON_ALIBI, BLOOM,
    MPT, GPT_NEO, BART, BLENDERBOT_SMALL, BIGBIRD_PEGASUS, GEMMA4, GEMMA4_KEYS_AS_VALUES, GEMMA4_EFFICIENT, MODERNBERT,
)  # fmt: skip


def families_of(model: nn.Module) -> Iterator[Family]:
    """Records that name the type of this model, in order."""
    types = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    return (family for family in FAMILIES if types & set(family.model_types))


def decoders_for(model: nn.Module) -> list[Decoder]:
    """Records of decoders to try on this model: those of its own type first, then all others whose parts it has."""
    families = (*families_of(model), *FAMILIES)
    return [
        decoder for decoder in dict.fromkeys(each.decoder for each in families) if _has_parts(model, decoder)
    ]


def _has_parts(model: nn.Module, decoder: Decoder) -> bool:
    module = _child(model, decoder.path)
    return all(_child(module, path) is not None for path in (decoder.tokens, decoder.layers))


def _child(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
