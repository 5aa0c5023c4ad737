"""The least bytes that a step of decoding reads, and the share of a copy's speed at which it reads them."""

COPY_BYTES = 2**29  # beyond any cache


def weight_bytes(model):
    """Bytes of the parameters and buffers that each step must read; of an embedding it reads a few rows, not counted.

    What several modules share counts once: an output head that is the embedding too is read. Of a mixture of experts
    all count.
    """
    looked_up, sizes = model.get_input_embeddings(), {}
    for module in model.modules():
        if module is not looked_up:
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            sizes |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def figures(row, num_bytes, used_bytes, bandwidth):
    """What a row says of it: the bytes of a median step, and the part of a copy's bandwidth that reads them.

    Args:
        row: Of a way, with ``between_tokens``.
        num_bytes: `weight_bytes`.
        used_bytes: Keys and values of live tokens in a median step, None where the cache does not tell.
        bandwidth: Bytes a second of a copy.
    """
    step = row["between_tokens"]["p50"]
    least = num_bytes + (used_bytes or 0)
    return {
        "weight_bytes": num_bytes,
        "least_bytes_per_step": least,
        "copy_bandwidth": bandwidth,
        "share_of_copy_bandwidth": least / step / bandwidth if step else None,
    }


def bandwidth(device):
    """Bytes a second of a copy on a device."""
    from fusedops.testing.timing import copy_bandwidth

    return copy_bandwidth(COPY_BYTES, rounds=5, device=device)
