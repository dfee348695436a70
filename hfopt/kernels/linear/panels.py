"""Panels: 32 output columns of a linear layer of many rows, two blocks.

Two that follow each other, or with `gated` the same 16 columns of both matrices.
"""

from hfopt.kernels.jit.parallel import body
from hfopt.kernels.linear.blocks import SIZE, count_blocks, field_of, find_block
from hfopt.kernels.simd.types import LANES

PANELS = 4  # most of a group that is worked on together


@body
def count_panels(layer):
    """Number of panels."""
    return count_blocks(layer) if layer.gated else (count_blocks(layer) + 1) // 2


@body
def half_panel(layer, panel, half):
    """(matrix, first row, rows) behind 16 of the 32 columns of a panel; 0 rows behind the last block."""
    if layer.gated:
        matrix, first = half, panel * LANES
    else:
        index = 2 * panel + half
        if index >= count_blocks(layer):
            return 0, 0, 0
        matrix, first = find_block(layer, index)
    return matrix, first, min(field_of(layer, matrix, SIZE) - first, LANES)


@body
def split_tiles(n_tiles, n_panels, n_threads):
    """(panels of a group, parts that the tiles of x are split into) so that the last groups leave no thread idle for long.

    Small groups read x more often, and weights are packed anew for each part.
    """
    group = max(1, min(PANELS, n_panels // (8 * n_threads)))
    return group, min(n_tiles, max(1, 4 * n_threads // n_panels))
