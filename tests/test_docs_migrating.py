"""The page for those who come from ipex.llm: no name of theirs is missing, and each of ours exists."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()

# The public names of ipex.llm (last release), of the parts of ipex.quantization that were for language models, arguments of
# optimize, attributes of configurations that it read, and classes of optimum-intel.
_NAMES = """
ipex.llm.optimize ipex.optimize_transformers ipex.llm.load_low_precision_checkpoint ipex.llm.shard_low_precision_checkpoint
ipex._set_optimized_model_for_generation
optimizer dtype inplace device quantization_config qconfig_summary_file low_precision_checkpoint sample_inputs
deployment_mode
cache_weight_for_large_batch
text_max_length lm_head_generation token_latency kv_cache_dtype batch_size audio_batch_size input_mode use_fused_moe
use_fused_moe_woq use_ipex_optimize
LinearSilu LinearRelu LinearGelu LinearNewGelu LinearSiluMul LinearMul LinearAdd LinearAddAdd Linear2SiluMul GatedMLPMOE
RotaryEmbedding RMSNorm FastLayerNorm VarlenAttention PagedAttention IndirectAccessKVCacheAttention MambaMixer
reshape_and_cache reshape_and_cache_flash single_query_cached_kv_attention flash_attn_varlen_func
causal_conv1d_fn causal_conv1d_update selective_scan_fn selective_state_update apply_function
rotary_embedding rms_norm fast_layer_norm indirect_access_kv_cache_attention varlen_attention silu_mul gelu_mul add_rms_norm
add_layer_norm bgmv_shrink bgmv_expand bgmv_expand_slice sgmv_shrink sgmv_expand sgmv_expand_slice
hf_greedy_search hf_sample hf_beam_search hf_beam_sample
IPEXWeightOnlyQuantizedLinear QuantMethod QuantDtype WeightOnlyQuantizedLinear get_weight_only_quant_qconfig_mapping
get_smooth_quant_qconfig_mapping prepare convert gptq autotune save_qconf_summary load_qconf_summary
WoqWeightDtype WoqLowpMode WoqActQuantMode WoqWeightQScheme
IPEXModelForCausalLM IPEXModelForSeq2SeqLM IPEXModelForSequenceClassification IPEXModelForTokenClassification
IPEXModelForQuestionAnswering IPEXModelForMaskedLM IPEXModelForImageClassification IPEXModelForAudioClassification
IPEXSentenceTransformer inference_mode
OMP_NUM_THREADS numactl KMP_BLOCKTIME KMP_TPAUSE libtcmalloc
"""

# Flags of run.py, the dispatcher of its scripts.
_FLAGS = """
--model-id --model-name-or-path --dtype --ipex --output-dir --quantized-model-path --qconfig-summary-file --quant-model-name
--ipex-smooth-quant --ipex-weight-only-quantization --lowp-mode --weight-dtype --act-quant-mode --low-precision-checkpoint
--gptq --gptq-legacy-format --group-size --cache-weight-for-large-batch --woq-sym-quant-weight --max-new-tokens --benchmark
--input-tokens --prompt --num-iter --num-warmup --batch-size --token-latency --greedy --sample --streaming --profile
--disable-deployment-mode --enable-thinking --generation-config --lm-head-generation --kv-cache-dtype --input-mode
--image-url --audio --autotp --shard-model --local_rank --config-file --deployment-mode --torch-compile --backend
"""


@pytest.mark.parametrize("name", [*_NAMES.split(), *_FLAGS.split()])
def test_no_old_name_is_missing(name: str) -> None:
    assert re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", PAGE.replace("ipex.llm.modules", ""))


def test_every_new_name_exists() -> None:
    names = set(re.findall(r"\bhfopt(?:\.\w+)+", PAGE))
    assert len(names) > 40
    missing = [name for name in sorted(names) if not _exists(name)]
    assert not missing


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True
