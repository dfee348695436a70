"""warmup(): compile every kernel now, instead of during the first requests."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from hfopt.optimize import optimize
from hfopt.quantization import Format, QuantizationConfig
from hfopt.words import DTYPES

_SIZE = 256  # divided by the groups of all formats
# Kernels are specialised by dtype alone, so two tiny models reach all of them: RMSNorm and a gated MLP with rotation, and
# LayerNorm with a plain MLP.
_CONFIGS = (
    LlamaConfig(
        hidden_size=_SIZE,
        intermediate_size=_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    ),
    OPTConfig(
        hidden_size=_SIZE,
        ffn_dim=_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=_SIZE,
        vocab_size=64,
        max_position_embeddings=64,
    ),
)
_PROMPT = 24  # tokens: more rows than the kernels for a few rows take


def warmup(
    quantization: str | Mapping[str, Any] | Format | QuantizationConfig | None = None,
    *,
    kv_cache: str | None = None,
) -> None:
    """Compile every kernel for float32, bfloat16 and float16 into the kernel cache, or load it from there, and measure
    where torch's are faster (a few seconds).

    quantization, kv_cache: as in `optimize`; the kernels of models in this format, or with this config, and of caches of
    this kind, too.
    The first calls of `optimize` and `generate` on a machine do the same for the kernels that they meet.

    Example:
        >>> import hfopt
        >>> hfopt.warmup()
    """
    from hfopt.functional import choice  # here, because `import hfopt` must not load Numba

    formats = (None,) if quantization is None else (None, quantization)
    caches = (None,) if kv_cache is None else (None, kv_cache)
    with torch.random.fork_rng(devices=[]):
        for config, dtype, format, cache in itertools.product(_CONFIGS, DTYPES, formats, caches):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
            optimize(model, kernels="hfopt", quantization=format, kv_cache=cache)
            tokens = torch.arange(_PROMPT)[None]
            for num_beams in (1, 2):
                model.generate(
                    tokens,
                    max_new_tokens=3,
                    do_sample=False,
                    num_beams=num_beams,
                    eos_token_id=None,
                    pad_token_id=0,
                )
    choice.choose_all()
