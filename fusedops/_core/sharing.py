"""Decoding on a CPU: where heads that share keys run as the queries of one head."""

import torch

SHARED_READS = 1 << 17  # elements of keys that all heads read, below which two more views cost what one reading saves


def shares_reading(heads, kv_heads, num_keys, dim):
    """Whether it pays for one query: keys are read once for all heads of a group, but fewer threads find work."""
    return heads > kv_heads >= torch.get_num_threads() and heads * num_keys * dim >= SHARED_READS
