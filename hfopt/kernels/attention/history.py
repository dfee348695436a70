"""Which rows of the cache hold what beams read, from the history of what they continued."""

from hfopt.kernels.jit.launch import launch


@launch
def trace_rows(history, prefix_len, length, share, prefix_row, table):
    """table[r, b]: the row that holds token prefix_len + b of row r; prefix_row[r]: the one that holds those before.

    history: int64 [>= length, n_rows]: once token t was stored, row r went on with what row history[t, r] had read. Rows
    share the prefix with the next `share` - 1 ones. prefix_row int32 [n_rows]; table int32 [n_rows, length - prefix_len + n]
    also names n tokens of each row behind those. Returns 1 if the history names a row that is not there.
    """
    n_rows, n_later = history.shape[1], length - prefix_len
    for row in range(n_rows):
        for b in range(n_later, table.shape[1]):
            table[row, b] = row
        at = row
        # one token more than the table has: rows may have been reordered behind the last one of the prefix
        for b in range(n_later - 1, -2 if prefix_len > 0 else -1, -1):
            at = history[prefix_len + b, at]
            if at < 0 or at >= n_rows:
                return 1
            if b >= 0:
                table[row, b] = at
        prefix_row[row] = at // share * share
    return 0
