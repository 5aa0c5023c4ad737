"""The operators that ask for their configurations: explanations ask what launches ask, and every candidate is right."""

import pytest
import torch

import fusedops
from fusedops import compress_24, prune_24, quantize_int4, quantize_int8
from fusedops._core import env, tuning
from fusedops._core.device import INTERPRETER, TARGETS
from fusedops._core.explain import operator_call
from fusedops._core.register import operators
from fusedops._core.tuning import store
from fusedops.testing import make_tensor
from fusedops.tuning.oracle import Oracle

HALF = torch.float16


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSEDOPS_BACKEND", "triton")
    store.forget_memory()
    env.refresh()
    yield
    store.forget_memory()
    env.refresh()


def rows(count=1, n=72):
    return [make_tensor((3, n), HALF, seed=seed) for seed in range(count)]


def vector(n=72):
    return make_tensor((n,), HALF, seed=9)


def heads(batch, length, num, dim=32, seed=0):
    return make_tensor((batch, length, num, dim), HALF, seed=seed)


def paged():
    (q, *caches, table, lengths), _ = operators()["paged_attention"].example((2, 24, 2, 32), HALF, "cpu")
    return torch.cat((q, q), 1), *caches, table, lengths


def rotated():
    return heads(1, 3, 4), heads(1, 3, 2, seed=1), *(make_tensor((1, 3, 32), HALF, seed=seed) for seed in (2, 3))


def product(rows, columns=80, depth=160):
    a, b = (make_tensor((size, depth), torch.float32, seed=seed) for seed, size in enumerate((rows, columns)))
    (a, scale_a), (b, scale_b) = quantize_int8(a), quantize_int8(b)
    return a, b, scale_a, scale_b


def weight_only(rows):
    values, scale, *zero = quantize_int4(make_tensor((96, 128), HALF, seed=1), group_size=64)
    return (make_tensor((rows, 128), HALF, seed=0), values, scale), {"zero": zero[0]} if zero else {}


def sparse(rows):
    return (make_tensor((rows, 200), HALF, seed=0), *compress_24(prune_24(make_tensor((96, 200), HALF, seed=1)))), {}


CALLS = {
    "rms_norm": lambda: ((*rows(), vector()), {}),
    "add_rms_norm": lambda: ((*rows(2), vector()), {}),
    "add_rms_norm_": lambda: ((*rows(2), vector()), {"rounding": "llama"}),
    "rms_norm_quantized": lambda: ((*rows(), vector()), {}),
    "add_rms_norm_quantized": lambda: ((*rows(2), vector()), {}),
    "layer_norm": lambda: ((*rows(), vector(), vector()), {}),
    "add_layer_norm": lambda: ((*rows(2), vector()), {}),
    "rotary": lambda: (rotated(), {}),
    "silu_mul": lambda: (rows(2, 700), {}),
    "gelu_mul": lambda: (rows(2, 700), {"approximate": "tanh"}),
    "silu_mul_quantized": lambda: (rows(2), {}),
    "attention": lambda: ((heads(1, 24, 4), heads(1, 24, 2, seed=1), heads(1, 24, 2, seed=2)), {"causal": True}),
    "paged_attention": lambda: (paged(), {}),
    "int8_matmul tile": lambda: (product(70), {"out_dtype": HALF}),
    "int8_matmul small": lambda: (product(3), {"out_dtype": HALF}),
    "weight_only_matmul": lambda: weight_only(3),
    "weight_only_matmul many": lambda: weight_only(70),
    "sparse_matmul": lambda: sparse(3),
    "sparse_matmul many": lambda: sparse(70),
}
SAME_BITS = ("matmul", "norm", "rotary", "_mul")  # in the interpreter, which adds up a row in one order always
SAMPLE = 3


def call_of(name):
    """The registered operator, its arguments, and whether a configuration may change its bits."""
    args, kwargs = CALLS[name]()
    return operator_call(getattr(fusedops, name.split()[0]), *args, **kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_an_explanation_asks_what_the_launch_asks(name):
    operator, args = call_of(name)
    with tuning.observed() as explained:
        config = operator.module("triton").config(operator.name, INTERPRETER, *args)
    with tuning.observed() as launched:
        operator(*args)
    assert explained == launched and len(explained) == 1
    assert all(getattr(config, field) == getattr(explained[0].config, field) for field in explained[0].tunable.space)


@pytest.mark.parametrize("name", CALLS)
def test_every_sampled_candidate_is_right(name):
    """The first, the last and some between; what the table of products says never changes a bit."""
    operator, args = call_of(name)
    with tuning.observed() as asked:
        operator.module("triton").config(operator.name, INTERPRETER, *args)
    (choice,) = asked
    candidates = choice.tunable.candidates(INTERPRETER, choice.fields)
    assert candidates[0] == choice.config and len(candidates) == len(set(candidates)) > 1
    oracle, outputs = Oracle(operator, args), []
    for config in [candidates[0], *candidates[1 :: max(len(candidates) // SAMPLE, 1)], candidates[-1]]:
        with tuning.forced(choice.tunable, config):
            oracle.check()
            outputs.append(oracle._run(None))
    if any(word in name for word in SAME_BITS):
        assert all(torch.equal(a, b) for one in outputs for a, b in zip(one, outputs[0]))


def test_a_configuration_for_sums_never_depends_on_other_rows():
    """A key without the number of rows, or a space without what a row's sum depends on."""
    for name, tunable in tuning.tunables().items():
        if "norm" in name:
            assert tunable.sizes == ("n",)
        if "matmul" in name:
            assert not {"block_k", "split_k", "num_splits", "splits", "kernel"} & {*tunable.space}


ASKED = {
    "attention": [(rows, dim, dim, size, masked) for rows in (1, 64, 4096) for dim in (64, 96, 128, 256, 512)
                  for size in (1, 2, 4) for masked in (False, True)],
    "paged_attention": [(rows, dim, dim, 2, size, window, False) for rows in (1, 8, 256) for dim in (64, 128, 256)
                        for size in (1, 2) for window in (False, True)],
    "scaled_matmul": [(rows, 4096, 4096, narrow) for rows in (65, 512, 4096) for narrow in (False, True)],
    "scaled_matmul_small": [(rows, columns, 4096, False) for rows in (1, 16, 64) for columns in (1024, 28672)],
    "weight_only_matmul": [(rows, 4096, depth, size, pack, group) for rows in (1, 16, 64, 2048) for depth in (576, 4096)
                           for size in (2, 4) for pack, group in ((1, None), (2, 32), (2, 128))],
    "sparse_matmul": [(rows, 4096, depth, size, expand) for rows in (1, 16, 64, 2048) for depth in (576, 4096)
                      for size, expand in ((4, False), (2, False), (1, False), (1, True))],
    "rms_norm": [(n,) for n in (1, 64, 576, 4096, 16384, 65536)],
}  # fmt: skip


def bytes_of(name, config, fields, limits):
    """What the kernel's own arithmetic says that a configuration takes of the shared memory."""
    import fusedops.ops.attention._triton as attention
    import fusedops.ops.paged_attention._triton as paged_attention
    import fusedops.ops.scaled_matmul._triton as scaled_matmul
    import fusedops.ops.sparse_matmul._triton as sparse_matmul

    if name == "attention":
        return attention.shared_bytes(config, fields[3], fields[4])
    if name == "paged_attention":
        return paged_attention.shared_bytes(config, *fields[3:], limits)
    if name.startswith("scaled_matmul"):
        return scaled_matmul.shared_bytes(config, limits)
    if name == "sparse_matmul":
        return sparse_matmul.shared_bytes(config, fields[3])
    if name == "weight_only_matmul":
        stored = config.block_n * config.block_k // fields[4] + config.block_m * config.block_k * fields[3]
        return config.num_stages * stored
    return 0


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("target", TARGETS)
def test_known_bug_b57_no_candidate_is_more_than_a_device_holds(name, target):
    """sgl-project/sglang#28038: a default wanted 147,456 bytes of shared memory, the device had 101,376."""
    for package in ("attention", "paged_attention", "int8_matmul", "weight_only_matmul", "sparse_matmul", "rms_norm"):
        operators()[package].module("triton")
    limits, tunable = TARGETS[target], tuning.tunables()[name]
    for fields in ASKED[name]:
        candidates = tunable.candidates(limits, fields)
        assert candidates[0] == tunable.default(*fields, limits)
        for config in candidates:
            assert bytes_of(name, config, fields, limits) <= limits.shared_memory, (fields, config)
            assert 1 <= config.num_warps <= 16 and config.num_warps & (config.num_warps - 1) == 0


