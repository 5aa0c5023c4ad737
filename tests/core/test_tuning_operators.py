"""The operators that ask for their configurations: explanations ask what launches ask, and every candidate is right."""

import contextlib

import pytest
import torch

import fusedops
from fusedops import compress_24, prune_24, quantize_int4, quantize_int8
from fusedops._core import device, env, tuning
from fusedops._core.device import INTERPRETER, TARGETS
from fusedops._core.explain import derivative_call, operator_call
from fusedops._core.register import operators
from fusedops._core.tuning import store
from fusedops.testing import make_tensor
from fusedops.tuning.oracle import Oracle
from tests.core.tuning_problems import Clock

HALF = torch.float16


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "ptx").symlink_to(env.cache_dir() / "ptx")  # what the emulator compiled stays known
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


def written(codes=None):
    k = make_tensor((3, 2, 24), HALF, seed=0)
    cache = torch.zeros(2, 16, 2, 24, dtype=codes or HALF)
    scales = {f"{name}_scale": torch.ones(2, 16, 2) for name in "kv"} if codes else {}
    return (k, k + 1, cache, cache.clone(), torch.tensor([5, -1, 17])), scales


def rotated_writes():
    (k, v, *caches, slots), _ = written()
    q, cos, sin = (make_tensor(shape, HALF, seed=3) for shape in ((3, 4, 24), (3, 16), (3, 16)))
    return (q, k, v, cos, sin, *caches, slots), {}


def merged():
    outs = [make_tensor((2, 3, 4, 40), HALF, seed=seed) for seed in (0, 1)]
    lses = [make_tensor((2, 4, 3), torch.float32, seed=seed) for seed in (2, 3)]
    return outs[0], lses[0], outs[1], lses[1]


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
    "merge_attention": lambda: (merged(), {}),
    "quantize_int8 rows": lambda: (rows(n=300), {}),
    "quantize_int8 tensor": lambda: (rows(n=400), {"granularity": "tensor"}),
    "quantize_int8 given": lambda: (rows(n=300), {"scale": torch.ones(3)}),
    "quantize_fp8 block": lambda: (rows(n=1100), {"granularity": "block"}),
    "quantize_fp8 block_2d": lambda: (rows(n=300), {"granularity": "block_2d"}),
    "quantize_int4": lambda: (rows(n=300), {"group_size": 32}),
    "write_kv_cache": lambda: written(),
    "write_kv_cache int8": lambda: written(torch.int8),
    "rotary_write_kv_cache": rotated_writes,
}
# In the interpreter, which adds up a row in one order always.
SAME_BITS = ("matmul", "norm", "rotary", "_mul", "merge", "quantize", "write")
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
        assert all(same_bits(one, outputs[0]) for one in outputs)


def same_bits(outputs, others):
    return all(_bytes(a).equal(_bytes(b)) for a, b in zip(outputs, others, strict=True))


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_gradients_of_attention_ask_for_both_kernels():
    """A candidate of each kernel is right while the other has its default."""
    args = heads(1, 20, 2), heads(1, 36, 1, seed=1), heads(1, 36, 1, seed=2)
    operator, args = derivative_call(fusedops.attention, *args, causal=True, softcap=5.0)
    with tuning.observed() as explained:
        pair = operator.module("triton").config(operator.name, INTERPRETER, *args)
    with tuning.observed() as launched:
        operator(*args)
    assert explained == launched and [one.tunable.name for one in explained] == ["attention_dkdv", "attention_dq"]
    assert [one.config for one in explained] == [*pair]
    oracle = Oracle(operator, args)
    oracle.check()
    for choice in explained:
        candidates = choice.tunable.candidates(INTERPRETER, choice.fields)
        assert candidates[0] == choice.config and len(candidates) == len(set(candidates)) > 8
        with tuning.forced(choice.tunable, candidates[-1]):
            oracle.check()


def test_derivatives_are_tuned_on_demand():
    clock = Clock(lambda name: 0.5 if name.startswith("block_m=1 ") else 1.0)
    torch.use_deterministic_algorithms(False)
    options = fusedops.tuning.Options(timer=clock, keep=False)
    report = fusedops.tune("rms_norm", *rows(), vector(), tuning=options, backward=True)
    (one,) = report.tuned
    assert report.op == "rms_norm_backward" == one.before.tunable.name and one.config.block_m == 1
    with pytest.raises(NotImplementedError, match="quantize_int8: .* no derivative"):
        fusedops.tune("quantize_int8", *rows(), backward=True)


# ---- kernels of Hopper and CUDA kernels, which the emulator runs as they are compiled

HOPPER = TARGETS["sm_90a"]


def hopper_attention():
    q, k, v = (make_tensor((1, 70, 2, 64), HALF, seed=seed) for seed in range(3))
    return "attention", (q, k[:, :, :1], v[:, :, :1]), {"causal": True}


def hopper_product():
    return "int8_matmul", product(65, 80, 160), {"out_dtype": HALF}


def cuda_product():
    return "sparse_matmul", sparse(70)[0], {}


EMULATED = {
    # what asks, on which target, what may be tuned there, how many configurations
    "attention": (hopper_attention, "sm_90a", "attention_hopper", 12),
    "product": (hopper_product, "sm_90a", "scaled_matmul_hopper", 45),
    "mma.sp": (cuda_product, "sm_80", "sparse_matmul_mma", 2),
    "wgmma.sp": (lambda: cuda_product(), "sm_90a", "sparse_matmul_wgmma", 9),
}


@contextlib.contextmanager
def emulated(name):
    target = EMULATED[name][1]
    with env.override("FUSEDOPS_BACKEND", "emulate"), env.override("FUSEDOPS_EMULATE_TARGET", target):
        yield


def emulated_choice(name):
    """(operator, arguments, what the launch asked)."""
    call, target, tunable, most = EMULATED[name]
    op, args, kwargs = call()
    operator, args = operator_call(getattr(fusedops, op), *args, **kwargs)
    limits = device.EMULATED[target]
    with tuning.observed() as explained:
        operator.module("emulate", args).config(operator.name, limits, *args)
    with tuning.observed() as launched:
        operator(*args)
    assert explained == launched and [one.tunable.name for one in explained] == [tunable]
    return operator, args, explained[0], most


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["mma.sp", "wgmma.sp"])
def test_a_candidate_of_an_emulated_kernel_is_right(name):
    """The last, whose tile is not the default's; the deep run has each, and Triton's, which take long."""
    with emulated(name):
        operator, args, choice, most = emulated_choice(name)
        candidates = choice.tunable.candidates(choice.limits, choice.fields)
        assert candidates[0] == choice.config and 1 < len(set(candidates)) == len(candidates) <= most
        check_candidates(operator, args, choice, candidates[-1:])


@pytest.mark.deep
@pytest.mark.emulated
@pytest.mark.parametrize("name", EMULATED)
def test_every_candidate_of_an_emulated_kernel_is_right(name):
    with emulated(name):
        operator, args, choice, _ = emulated_choice(name)
        candidates = choice.tunable.candidates(choice.limits, choice.fields)
        check_candidates(operator, args, choice, candidates)


def check_candidates(operator, args, choice, candidates):
    """They are right, and those of products give the default's bits, which are."""
    oracle = Oracle(operator, args)
    oracle.check()
    exact = oracle._run(None) if operator.name != "attention" else None
    for config in candidates:
        with tuning.forced(choice.tunable, config):
            if exact is None:
                oracle.check()
            else:
                assert same_bits(oracle._run(None), exact)


def test_what_hopper_takes_is_not_searched_for_portable_tiles():
    """A table for the portable kernel changes nothing where the Hopper kernel runs, and is not asked."""
    q = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    operator, args = operator_call(fusedops.attention, q, q[:, :, :2], q[:, :, :2], causal=True)
    with tuning.observed() as asked:
        operator.module("triton").config("attention", HOPPER, *args)
    assert [one.tunable.name for one in asked] == ["attention_hopper"]


def test_a_configuration_for_sums_never_depends_on_other_rows():
    """A key without the number of rows, or a space without what a row's sum depends on."""
    for name, tunable in tuning.tunables().items():
        if "norm" in name:
            assert tunable.sizes == ("n",)
        if "matmul" in name and "crossover" not in name:
            assert not {"block_k", "split_k", "num_splits", "splits", "kernel"} & {*tunable.space}


ROWS = [(n,) for n in (1, 64, 576, 4096, 16384, 65536)]
PAIRS = [("none", False), ("additive", True)]
# By the name of what is asked: its fields for calls of many kinds.
ASKED = {
    "attention": [(rows, dim, dim, size, masked) for rows in (1, 64, 4096) for dim in (64, 96, 128, 256, 512)
                  for size in (1, 2, 4) for masked in (False, True)],
    "attention_hopper": [(4096, 4096, dim, dim_v, size, plain) for dim in (64, 128, 192, 256) for dim_v in (64, 128)
                         for size in (1, 2) for plain in (False, True)] + [(4096, 4096, 256, 256, 2, False)],
    **{name: [(4096, 4096, width, size, softcap, kind) for width in (16, 64, 128, 256) for size in (2, 4)
              for kind, softcap in PAIRS] for name in ("attention_dkdv", "attention_dq")},
    "merge_attention": [(dim,) for dim in (16, 40, 64, 128, 256, 512)],
    "paged_attention": [(rows, dim, dim, 2, size, window, False) for rows in (1, 8, 256) for dim in (64, 128, 256)
                        for size in (1, 2) for window in (False, True)],
    "scaled_matmul": [(rows, 4096, 4096, narrow) for rows in (65, 512, 4096) for narrow in (False, True)],
    "scaled_matmul_small": [(rows, columns, 4096, False) for rows in (1, 16, 64) for columns in (1024, 28672)],
    "scaled_matmul_hopper": [(rows, 4096, 4096, is_int) for rows in (65, 512, 4096) for is_int in (False, True)],
    "weight_only_matmul": [(rows, 4096, depth, size, pack, group) for rows in (1, 16, 64, 2048) for depth in (576, 4096)
                           for size in (2, 4) for pack, group in ((1, None), (2, 32), (2, 128))],
    "sparse_matmul": [(rows, 4096, depth, size, expand) for rows in (1, 16, 64, 2048) for depth in (576, 4096)
                      for size, expand in ((4, False), (2, False), (1, False), (1, True))],
    "sparse_matmul_mma": [(rows, 4096, 4096, size) for rows in (65, 512, 8192) for size in (1, 2)],
    "sparse_matmul_wgmma": [(rows, 4096, 4096, is_fp8) for rows in (65, 512, 8192) for is_fp8 in (False, True)],
    **dict.fromkeys(("rms_norm", "rms_norm_quantized", "rms_norm_backward", "layer_norm", "layer_norm_backward",
                     "gated_activation", "gated_activation_backward", "silu_mul_quantized", "quantize_rows"), ROWS),
    "quantize_parts": [(n, kind) for (n,) in ROWS for kind in ("tensor", "block", "block_2d")],
    "quantize_int4": [(32,), (64,), (128,)],
    "rotary": [(num, dim, rotated) for num in (1, 9, 32) for dim, rotated in ((64, 64), (128, 64), (256, 256))],
    "write_kv_cache": [(dim, dim, rotated) for dim in (16, 40, 64, 128, 256) for rotated in (0, 16, dim // 2 * 2)],
}  # fmt: skip
NO_KERNEL = {"sparse_matmul_crossover"}  # for how many rows another kernel takes the product


def bytes_of(name, config, fields, limits):
    """What the kernel's own arithmetic says that a configuration takes of the shared memory."""
    import fusedops.ops.attention._triton as attention
    import fusedops.ops.paged_attention._triton as paged_attention
    import fusedops.ops.scaled_matmul._triton as scaled_matmul
    import fusedops.ops.sparse_matmul._triton as sparse_matmul
    from fusedops.ops.sparse_matmul._cuda import wgmma

    if name == "attention":
        return attention.shared_bytes(config, fields[3], fields[4])
    if name == "attention_hopper":
        return attention.hopper_launch.shared_bytes(config, fields[4])
    if name in ("attention_dkdv", "attention_dq"):
        blocks = config.block_n, config.block_m
        stays, moves = blocks if name == "attention_dkdv" else blocks[::-1]
        rest = config.num_stages, 2 * fields[2], fields[3], fields[5] != "none", limits
        return attention.backward_launch.shared_bytes(stays, moves, *rest)
    if name == "paged_attention":
        return paged_attention.shared_bytes(config, *fields[3:], limits)
    if name == "scaled_matmul_hopper":
        return scaled_matmul.hopper_launch.shared_bytes(config)
    if name.startswith("scaled_matmul"):
        return scaled_matmul.shared_bytes(config, limits)
    if name == "sparse_matmul":
        return sparse_matmul.shared_bytes(config, fields[3])
    if name == "sparse_matmul_mma":
        return config.shared_bytes(fields[3])
    if name == "sparse_matmul_wgmma":
        return wgmma.shared_bytes(config, 1 if fields[3] else 2)
    if name == "weight_only_matmul":
        stored = config.block_n * config.block_k // fields[4] + config.block_m * config.block_k * fields[3]
        return config.num_stages * stored
    return 0


def import_kernels():
    for operator in operators().values():
        for kind in {"cuda", "triton"}.intersection(operator.implementations):
            operator.module(kind)


def test_every_kernel_that_asks_is_asked_here():
    """A new one has to be added to ASKED, whose questions the next test asks for every device."""
    import_kernels()
    kernels = {name for name, one in tuning.tunables().items() if "tests" not in one._sources[0]}
    assert kernels == {*ASKED} | NO_KERNEL


# Where these kernels run; their arithmetic means nothing elsewhere. No kernel of ours runs on sm_75.
NEWER = tuple(name for name in TARGETS if name != "sm_75")
ONLY_ON = {
    **dict.fromkeys(("attention_hopper", "scaled_matmul_hopper", "sparse_matmul_wgmma"), ("sm_90a",)),
    **dict.fromkeys(("attention_dkdv", "attention_dq", "sparse_matmul_mma"), NEWER),
}
PAIRS_OF_TARGETS = [(name, target) for name in ASKED for target in ONLY_ON.get(name, TARGETS)]


@pytest.mark.parametrize(("name", "target"), PAIRS_OF_TARGETS)
def test_known_bug_b57_no_candidate_is_more_than_a_device_holds(name, target):
    """sgl-project/sglang#28038: a default wanted 147,456 bytes of shared memory, the device had 101,376."""
    import_kernels()
    limits, tunable = TARGETS[target], tuning.tunables()[name]
    for fields in ASKED[name]:
        candidates = tunable.candidates(limits, fields)
        assert candidates[0] == tunable.default(*fields, limits)
        for config in candidates:
            assert bytes_of(name, config, fields, limits) <= limits.shared_memory, (fields, config)
            warps = getattr(config, "num_warps", 4)
            assert 1 <= warps <= 16 and warps & (warps - 1) == 0
