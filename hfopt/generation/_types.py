"""Names for what transformers types too narrowly, or not at all."""

from typing import Any, TypeAlias

# a PreTrainedModel with the methods of GenerationMixin
Model: TypeAlias = Any
# a CausalLMOutputWithPast, or what a model has in its place
Outputs: TypeAlias = Any
# an int64 tensor, which torch.Tensor calls Tensor and transformers LongTensor
Ids: TypeAlias = Any
