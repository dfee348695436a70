"""warmup(): compile every kernel now, instead of during the first requests."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from hfopt.optimize import optimize

# Kernels are specialised by dtype alone, so two tiny models reach all of them: RMSNorm and a gated MLP with rotation, and
# LayerNorm with a plain MLP.
_CONFIGS = (
    LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    ),
    OPTConfig(
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        vocab_size=64,
        max_position_embeddings=64,
    ),
)
_PROMPT = 24  # tokens: more rows than the kernels for a few rows take


def warmup() -> None:
    """Compile every kernel for float32 and bfloat16 into the kernel cache, or load it from there, and measure where torch's
    are faster (under two seconds).

    The first calls of `optimize` and `generate` on a machine do the same for the kernels that they meet.
    """
    from hfopt.functional import choice  # here, because `import hfopt` must not load Numba

    with torch.random.fork_rng(devices=[]):
        for config in _CONFIGS:
            for dtype in (torch.float32, torch.bfloat16):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
                optimize(model, kernels="hfopt")
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
