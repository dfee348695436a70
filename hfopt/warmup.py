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
# Kernels are specialised by dtype alone, so two tiny models reach all of a program: RMSNorm and a gated MLP with rotation,
# and LayerNorm with a plain MLP. What only some families have is in there too, but for the kernels that modules call.
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
        for dtype in DTYPES:
            _run_alone(dtype)
    choice.choose_all()


def _run_alone(dtype: torch.dtype) -> None:
    """Operations of modules that neither of the two models has."""
    from hfopt import functional

    x, angles, number = torch.ones(1, 1, 4, dtype=dtype), torch.ones(1, 1, 4), torch.ones(1, dtype=dtype)
    functional.clamp(x, 1.0)
    functional.scale(x, 1.0)
    functional.xielu(x, functional.Xielu(number, number, number, number))
    functional.norm_heads(x, functional.Norm("rms", None, None, 1e-6), 0, 1, 4)
    functional.rotate(x, angles, angles, 1, 4, "half")
