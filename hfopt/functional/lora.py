"""Low-rank adapters (LoRA) that are kept beside the weights: y += B (scaling A x), with an adapter of its own for each row.

`bgmv_*` are told the adapter of each row, `sgmv_*` that of each segment of rows; -1 is for none. Names and shapes are those
of ipex.llm and of vLLM's operations (Punica, https://arxiv.org/abs/2310.18547).
"""

from torch import Tensor

from .adapters import Names, check_indices, expand, matrices, of_segments, shrink, slice_of
from .gradients import without_gradients
from .integers import integers

_BGMV = Names("input", "lora_weights", "output")
_SGMV_A = Names("inputs", "lora_a_weights", "output_tensor")
_SGMV_B = Names("inputs", "lora_b_weights", "output_tensor")


# ---- an adapter for each row -------------------------------------------------------------------------------------------


@without_gradients
def bgmv_shrink(
    input: Tensor, lora_weights: Tensor, output: Tensor, token_lora_mapping: Tensor, scaling: float = 1.0
) -> None:
    """Write output[i, :rank] = scaling * A[token_lora_mapping[i]] input[i].

    input [rows, size]; lora_weights, the matrices A, [adapters, rank, size] or [adapters, 1, rank, size], of the same dtype;
    output [rows, at least rank], float32, bfloat16 or float16, which may be another; token_lora_mapping integers [rows].
    Sums are float32, rounded once. Rows of index -1, without an adapter, and columns from `rank` on are left as they are.
    Strided tensors are fine. Raises `InvalidInput`, with nothing written. https://arxiv.org/abs/2310.18547

    >>> import torch
    >>> from hfopt.functional import bgmv_shrink
    >>> x, a = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0, 1.0]]])
    >>> v = torch.zeros(2, 1)
    >>> bgmv_shrink(x, a, v, torch.tensor([0, -1]), scaling=0.5)
    >>> v
    tensor([[1.5000],
            [0.0000]])
    """
    weights = matrices(_BGMV.weights, lora_weights)
    indices = integers("token_lora_mapping", token_lora_mapping, (None,))
    check_indices("token_lora_mapping", indices, len(weights))
    shrink(_BGMV, input, weights, output, indices, scaling)


@without_gradients
def bgmv_expand(
    input: Tensor, lora_weights: Tensor, output: Tensor, token_lora_mapping: Tensor, add_inputs: bool = True
) -> None:
    """Write output[i] = B[token_lora_mapping[i]] input[i], added to what is there if `add_inputs`.

    input [rows, rank], of any of the dtypes; lora_weights, the matrices B, [adapters, outputs, rank] or
    [adapters, 1, outputs, rank]; output [rows, columns]; each float32, bfloat16 or float16. Where outputs and columns
    differ, as they do where one of them is padded, the first ones of both count. The rest is as in `bgmv_shrink`.

    >>> import torch
    >>> from hfopt.functional import bgmv_expand
    >>> y, b = torch.ones(2, 3), torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> bgmv_expand(torch.tensor([[1.5], [0.0]]), b, y, torch.tensor([0, -1]))
    >>> y
    tensor([[2.5000, 4.0000, 5.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    weights = matrices(_BGMV.weights, lora_weights)
    indices = integers("token_lora_mapping", token_lora_mapping, (None,))
    check_indices("token_lora_mapping", indices, len(weights))
    expand(_BGMV, input, weights, output, indices, add_inputs)


@without_gradients
def bgmv_expand_slice(
    input: Tensor,
    lora_weights: Tensor,
    output: Tensor,
    token_lora_mapping: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Write `bgmv_expand` into columns slice_offset to slice_offset + slice_size of the output, as many as B has outputs.

    >>> import torch
    >>> from hfopt.functional import bgmv_expand_slice
    >>> y, b = torch.zeros(1, 4), torch.tensor([[[1.0], [2.0]]])
    >>> bgmv_expand_slice(torch.tensor([[3.0]]), b, y, torch.tensor([0]), slice_offset=1, slice_size=2)
    >>> y
    tensor([[0., 3., 6., 0.]])
    """
    weights = matrices(_BGMV.weights, lora_weights)
    columns = slice_of(_BGMV, output, weights, slice_offset, slice_size)
    bgmv_expand(input, weights, columns, token_lora_mapping, add_inputs)


# ---- an adapter for each segment of rows -------------------------------------------------------------------------------


@without_gradients
def sgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    scaling: float,
) -> None:
    """Write output_tensor[i, :rank] = scaling * A[a] inputs[i], a being the adapter of the segment where row i is.

    Segment s is the seq_len_tensor[s] rows from b_seq_start_loc[s] on, and has adapter lora_indices_tensor[s], for
    s < batches: integers [at least batches]. Segments do not overlap and have at most max_seq_length rows; rows in none are
    left as they are. The rest is as in `bgmv_shrink`.

    >>> import torch
    >>> from hfopt.functional import sgmv_shrink
    >>> x, a = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> v = torch.zeros(3, 1)
    >>> sgmv_shrink(x, a, v, torch.tensor([0, 2]), torch.tensor([2, 1]), torch.tensor([1, 0]), 2, 2, 1.0)
    >>> v
    tensor([[4.],
            [4.],
            [2.]])
    """
    weights = matrices(_SGMV_A.weights, lora_a_weights)
    segments = b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length
    indices = of_segments(_SGMV_A, inputs, *segments, len(weights))
    shrink(_SGMV_A, inputs, weights, output_tensor, indices, scaling)


@without_gradients
def sgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    add_inputs: bool = False,
) -> None:
    """Write output_tensor[i] = B[a] inputs[i], added to what is there if `add_inputs`, a as in `sgmv_shrink`.

    Shapes and dtypes are as in `bgmv_expand`.

    >>> import torch
    >>> from hfopt.functional import sgmv_expand
    >>> v, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0], [10.0]]])
    >>> y = torch.zeros(2, 2)
    >>> sgmv_expand(v, b, y, torch.tensor([0]), torch.tensor([2]), torch.tensor([0]), 1, 2)
    >>> y
    tensor([[ 1., 10.],
            [ 2., 20.]])
    """
    weights = matrices(_SGMV_B.weights, lora_b_weights)
    segments = b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length
    indices = of_segments(_SGMV_B, inputs, *segments, len(weights))
    expand(_SGMV_B, inputs, weights, output_tensor, indices, add_inputs)


@without_gradients
def sgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    b_seq_start_loc: Tensor,
    seq_len_tensor: Tensor,
    lora_indices_tensor: Tensor,
    batches: int,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """Write `sgmv_expand` into columns slice_offset to slice_offset + slice_size of the output, as many as B has outputs.

    >>> import torch
    >>> from hfopt.functional import sgmv_expand_slice
    >>> v, b, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0]]]), torch.zeros(2, 2)
    >>> segments = torch.tensor([0]), torch.tensor([2]), torch.tensor([0]), 1, 2
    >>> sgmv_expand_slice(v, b, y, *segments, slice_offset=1, slice_size=1)
    >>> y
    tensor([[0., 1.],
            [0., 2.]])
    """
    weights = matrices(_SGMV_B.weights, lora_b_weights)
    columns = slice_of(_SGMV_B, output_tensor, weights, slice_offset, slice_size)
    segments = b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, max_seq_length
    sgmv_expand(inputs, weights, columns, *segments, add_inputs)
