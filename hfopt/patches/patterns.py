"""All patterns: those of the families' parts, and of parts that stand in models of no family."""

import itertools

from hfopt.patches import attention_pattern, layer, mlp, transform
from hfopt.patches.families import FAMILIES
from hfopt.patches.linear import LINEAR
from hfopt.patches.norm import LAYER_NORM, RMS_NORM

_MLPS = (family.mlp for family in FAMILIES if family.mlp is not None)

_TRANSFORMS = (family.transform for family in FAMILIES if family.transform is not None)
_ATTENTIONS = dict.fromkeys(family.attention for family in FAMILIES)
_LAYERS = dict.fromkeys(family.layer for family in FAMILIES)

# In this order: attention and layers are recognised by their swapped parts, and a Linear stands for itself if no other
# pattern reads it.
PATTERNS = (
    RMS_NORM,
    LAYER_NORM,
    *map(attention_pattern.pattern_of, _ATTENTIONS),
    *map(mlp.pattern_of, dict.fromkeys(_MLPS)),
    *itertools.chain.from_iterable(map(layer.patterns_of, _LAYERS)),
    *map(transform.pattern_of, dict.fromkeys(_TRANSFORMS)),
    LINEAR,
)
