"""Which weights share a scale. Checks and implementations ask here."""

GROUPS = (32, 64, 128)  # consecutive weights of a row
BLOCK = 128  # rows and columns of a block
ZERO_STEPS = 16  # of a code, that zeros are counted in


def group_of(N, K, shape):
    """(rows, columns) of the weights [N, K] that share one element of a table of this shape; None where none fits."""
    if shape in ((), (1,)):
        return N, K
    if shape == (N,):
        return 1, K
    if len(shape) != 2:
        return None
    if shape[0] == N:
        return next(((1, size) for size in GROUPS if -(-K // size) == shape[1]), None)
    return (BLOCK, BLOCK) if shape == (-(-N // BLOCK), -(-K // BLOCK)) else None
