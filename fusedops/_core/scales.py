"""How kernels address scales: of rows of a product, and of a quantised cache of keys and values."""


def scale_kind(scale):
    """ "none", "head" for one scale or one for each head, "token" for one beside every token and head."""
    return "none" if scale is None else "token" if scale.dim() == 3 else "head"


def scale_strides(scale):
    """(page, slot, head), 0 where one scale serves all."""
    if scale is None:
        return 0, 0, 0
    return scale.stride() if scale.dim() == 3 else (0, 0, scale.stride(0) if scale.numel() > 1 else 0)


def row_kind(scale):
    """ "none", "one" for all rows, "row" for one each."""
    return "none" if scale is None else "row" if scale.numel() > 1 else "one"
