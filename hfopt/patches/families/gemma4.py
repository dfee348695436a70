"""Gemma 4: Gemma 2 and 3 with a norm of values, layers that read the keys and values of others, or take keys for values too,
and an input of each layer's own.
"""

from dataclasses import replace

from hfopt.patches.families.family import InputParts, LayerInputs
from hfopt.patches.families.gemma import GEMMA2

_DECODER = replace(
    GEMMA2.decoder,
    layer_inputs=LayerInputs(
        "embed_tokens_per_layer",
        "per_layer_model_projection",
        "per_layer_projection_norm",
        projection_scale="per_layer_model_projection_scale",
        scale="per_layer_input_scale",
    ),
)

GEMMA4 = replace(
    GEMMA2,
    name="Gemma 4",
    model_types=("gemma4_text", "gemma4_unified_text"),
    attention=replace(GEMMA2.attention, norms=(("q_norm", "k_norm", "v_norm"),)),
    layer=replace(GEMMA2.layer, scalar="layer_scalar"),
    decoder=_DECODER,
)
GEMMA4_KEYS_AS_VALUES = replace(
    GEMMA4,
    name="Gemma 4, keys as values",
    attention=replace(GEMMA4.attention, inputs=("q_proj", "k_proj", "k_proj")),
)
GEMMA4_EFFICIENT = replace(
    GEMMA4,
    name="Gemma 4, shared keys and values",
    attention=replace(GEMMA4.attention, inputs=("q_proj",), norms=(("q_norm",),), stores=False),
    layer=replace(
        GEMMA4.layer,
        input=InputParts(
            "per_layer_input_gate", "act_fn", "per_layer_projection", "post_per_layer_input_norm"
        ),
    ),
)
