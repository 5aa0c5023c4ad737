"""sparse_matmul: planted faults, what is refused, and torch's own machinery."""

import pytest
import torch
import torch.nn.functional as F

import fusedops
from fusedops import compress_24, decompress_24, prune_24, sparse_matmul
from fusedops._core import env
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor
from fusedops.testing.faults import metadata_faults, standard_faults
from tests.ops.common import assert_compiles, assert_fake_like_real, assert_rejected, opcheck
from tests.ops.sparse_problems import FP8, call_of

INF, NAN = float("inf"), float("nan")

# ---- planted faults

WRONG_OPTIONS = {
    "scale_a one percent larger": lambda o: o | {"scale_a": o["scale_a"] * 1.01},
    "scale_b one percent smaller": lambda o: o | {"scale_b": o["scale_b"] * 0.99},
    "scale_a of the next row": lambda o: o | {"scale_a": o["scale_a"].roll(1)},
    "scale_b of the next row": lambda o: o | {"scale_b": o["scale_b"].roll(1)},
    "scales swapped": lambda o: o | {"scale_a": o["scale_b"][:5], "scale_b": o["scale_a"].repeat(14)},
    "scale_a ignored": lambda o: o | {"scale_a": None},
    "scale_b ignored": lambda o: o | {"scale_b": None},
    "scale_b twice": lambda o: o | {"scale_b": o["scale_b"] ** 2},
    "bias twice": lambda o: o | {"bias": 2 * o["bias"]},
    "bias lost": lambda o: o | {"bias": None},
    "bias of the next column": lambda o: o | {"bias": o["bias"].roll(1)},
    "activation lost": lambda o: o | {"activation": None},
    "another activation": lambda o: o | {"activation": "silu"},
}


def rolled(x):
    """Each row is the one before it."""
    return x.view(torch.uint8).roll(1, 0).view(x.dtype)


def swapped(values):
    return values.unflatten(1, (-1, 2))[..., [1, 0]].flatten(1)


def first_tile_twice(a, values, metadata):
    return torch.cat((a[:, :128], a), 1), *(torch.cat((x[:, :n], x), 1) for x, n in ((values, 64), (metadata, 16)))


WRONG_OPERANDS = {
    "last k dropped": lambda a, values, metadata: (F.pad(a[:, :-1], (0, 1)), values, metadata),
    "rows of a shifted": lambda a, values, metadata: (rolled(a), values, metadata),
    "values of a pair swapped": lambda a, values, metadata: (a, swapped(values), metadata),
    "rows of values shifted": lambda a, values, metadata: (a, rolled(values), metadata),
    "second half of k lost": lambda a, values, metadata: (
        a, torch.cat((values[:, :96], torch.zeros_like(values[:, 96:])), 1), metadata
    ),
    "first k tile counted twice": first_tile_twice,
}  # fmt: skip


def model(a, values, metadata, *, scale_a, scale_b, bias, out_dtype, activation, fault):
    """The product in float64 and what follows, with one fault of the kind that kernels have."""
    acc = a.double() @ decompress_24(values, metadata, in_features=a.shape[1]).double().T
    if fault == "sums in 8 bits":
        acc = acc.to(torch.int64).to(torch.int8).double()
    if fault == "sums in 16 bits":
        acc = acc.to(torch.int64).to(torch.int16).double()
    if fault == "sums rounded to bfloat16":
        acc = acc.bfloat16().double()
    if fault == "codes without a sign":
        acc = a.view(torch.uint8).double() @ decompress_24(values, metadata, in_features=a.shape[1]).double().T
    if fault == "bias before the scales":
        acc, bias = acc + bias, 0.0
    out = acc * scale_a.double()[:, None] * scale_b.double()
    if fault == "activation before the bias":
        return (F.gelu(out) + bias).to(out_dtype)
    return F.gelu(out + bias).to(out_dtype)


FAULTS_OF_KERNELS = (
    "sums in 8 bits", "sums in 16 bits", "sums rounded to bfloat16", "codes without a sign", "bias before the scales",
    "activation before the bias",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_planted_faults_are_rejected(dtype):
    """Of K = 300 the last vectors of values are padding in part: reading it as a weight is one of the faults."""
    call = call_of(dtype, 5, 70, 300, 3, torch.float32, torch.float32, "gelu")
    call.options["scale_a"] *= 4  # activations differ around 1

    def check(candidate):
        assert_accurate(call.run(candidate), call.truth(), zeros=False)

    def of_operands(change):
        return lambda *operands, **options: sparse_matmul(*change(*operands), **options)

    def of_options(change):
        return lambda *operands, **options: sparse_matmul(*operands, **change(options))

    def padding_is_read(a, values, metadata, **options):
        """Columns beyond K are not zeros in memory: as if the neighbour's row followed, and were multiplied."""
        wider = torch.cat((a, rolled(a)[:, :20]), 1)
        values = values.clone()
        values[:, 150:] = 1
        return sparse_matmul(wider, values, metadata, **options)

    faults = [Fault(name, of_operands(change)) for name, change in WRONG_OPERANDS.items()]
    faults += [Fault(name, of_options(change)) for name, change in WRONG_OPTIONS.items()]
    faults += [Fault("padding is read", padding_is_read), *metadata_faults(sparse_matmul, 2)]
    if dtype == torch.int8:
        for name in FAULTS_OF_KERNELS:
            faults.append(Fault(name, lambda *args, name=name, **options: model(*args, fault=name, **options)))
        check(lambda *args, **options: model(*args, fault="none", **options))
    assert_faults_rejected(check, sparse_matmul, [*faults, *standard_faults(sparse_matmul)], minimum=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_planted_faults_of_floats_are_rejected(dtype):
    call = call_of(dtype, 5, 70, 300, 4, None, dtype, "gelu")

    def check(candidate):
        assert_accurate(call.run(candidate), call.truth(), zeros=False)

    faults = []
    for name, change in WRONG_OPERANDS.items():
        faults.append(Fault(name, lambda *args, change=change, **o: sparse_matmul(*change(*args), **o)))
    for name, change in WRONG_OPTIONS.items():
        if "scale" not in name:
            faults.append(Fault(name, lambda *args, change=change, **o: sparse_matmul(*args, **change(o))))
    faults += metadata_faults(sparse_matmul, 2)
    assert_faults_rejected(check, sparse_matmul, [*faults, *standard_faults(sparse_matmul)], minimum=30)


# ---- rejects

A, A8 = torch.ones(3, 100), torch.ones(3, 100, dtype=torch.int8)
VALUES, METADATA = compress_24(prune_24(torch.ones(6, 100)))
CODES = VALUES.to(torch.int8)
S3, S6 = torch.ones(3), torch.ones(6)
LONG = torch.empty(1, 2**30 + 1, device="meta", dtype=torch.float16)
LONG_VALUES = torch.empty(1, 2**29 + 32, device="meta", dtype=torch.float16)
LONG_METADATA = torch.empty(1, 2**27 + 16, device="meta", dtype=torch.uint8)
TALL = torch.empty(2**30 + 1, 32, device="meta", dtype=torch.int8)


def call(a=A, values=VALUES, metadata=METADATA, **options):
    return lambda: sparse_matmul(a, values, metadata, **options)


REJECTS = [
    (call(a=[1]), TypeError, "sparse_matmul: a must be a torch.Tensor, got list"),
    (call(values=None), TypeError, "sparse_matmul: values must be a torch.Tensor, got NoneType"),
    (call(metadata=0.5), TypeError, "sparse_matmul: metadata must be a torch.Tensor, got float"),
    (call(a=torch.tensor(1.0)), ValueError, r"a must have shape \[..., K\], got \[\]"),
    (call(values=VALUES[0]), ValueError, r"values must have shape \[N, columns\], got \[64\]"),
    (call(values=VALUES.to("meta")), ValueError, "values must be on cpu, got meta"),
    (call(metadata=METADATA.to("meta")), ValueError, "metadata must be on cpu, got meta"),
    (call(a=A.double(), values=VALUES.double()), TypeError, "values must be float16, bfloat16, .* got float64"),
    (call(a=A.half()), TypeError, "a must be float32 as values are, got float16"),
    (call(metadata=METADATA.to(torch.int8)), TypeError, "metadata must be uint8, got int8"),
    (call(metadata=METADATA[:5]), ValueError, r"metadata must have shape \[N, bytes\] with N=6, got \[5, 16\]"),
    (call(metadata=METADATA[:, :12]), ValueError, r"metadata must have shape \[6, 16\] for 64 columns of values, got"),
    (call(metadata=METADATA.repeat(1, 2)), ValueError, r"metadata must have shape \[6, 16\] .* got \[6, 32\]"),
    (call(values=VALUES[:, :50]), ValueError, r"values must have a multiple of 32 columns, got \[6, 50\]"),
    (call(a=A[:, :64]), ValueError, r"values must have shape \[N, ceil\(K / 64\) \* 32\] with K=64, got \[6, 64\]"),
    (call(a=torch.ones(3, 129)), ValueError, "with K=129, got"),
    (call(a=A[:, :0], values=VALUES[:, :0], metadata=METADATA[:, :0]), ValueError, "at least one row and one column"),
    (call(values=VALUES[:0], metadata=METADATA[:0]), ValueError, "at least one row and one column, got N=0, K=100"),
    (call(a=torch.ones(100, 3).T), ValueError, "a must have a contiguous last dimension"),
    (call(values=VALUES.T.contiguous().T), ValueError, r"values must be contiguous, got strides \[1, 6\]"),
    (call(metadata=METADATA.T.contiguous().T), ValueError, r"metadata must be contiguous, got strides \[1, 6\]"),
    (call(scale_a=S3), ValueError, "scale_a must be None unless values are int8 or float8_e4m3fn, got float32"),
    (call(scale_b=S6), ValueError, "scale_b must be None unless values are int8 or float8_e4m3fn, got float32"),
    (call(A8, CODES, scale_a=S6), ValueError, r"scale_a must have shape \[\], \[1\], \[...\] or \[rows\] = .* \[6\]"),
    (call(A8, CODES, scale_b=S3), ValueError, r"scale_b must have shape \[\], \[1\] or \[N\] = .* got \[3\]"),
    (call(A8, CODES, scale_a=0.5), TypeError, "scale_a must be a torch.Tensor, got float"),
    (call(A8, CODES, scale_a=S3.half()), TypeError, "scale_a must be float32, got float16"),
    (call(A8, CODES, scale_b=S6.double()), TypeError, "scale_b must be float32, got float64"),
    (call(A8, CODES, scale_b=S6.to("meta")), ValueError, "scale_b must be on cpu, got meta"),
    (call(bias=S3), ValueError, r"bias must have shape \[N\] with N=6, got \[3\]"),
    (call(bias=S6.half()), TypeError, "bias must be float32 or float32, got float16"),
    (call(A8, CODES, bias=S6.half()), TypeError, "bias must be bfloat16 or float32, got float16"),
    (call(bias=torch.ones(12)[::2]), ValueError, "bias must have a contiguous last dimension"),
    (call(out_dtype=torch.bfloat16), TypeError, "out_dtype must be float32, got bfloat16"),
    (call(A8, CODES, out_dtype=torch.int8), TypeError, "out_dtype must be one of float16, bfloat16, float32, got int8"),
    (call(activation="tanh"), ValueError, "activation must be one of None, 'silu', 'gelu', 'gelu_tanh', 'relu', got"),
    (call(LONG, LONG_VALUES, LONG_METADATA), NotImplementedError, "K must be at most MAX_SIZE = 1073741824, got 10737"),
    (call(TALL[:, :1], TALL[:1], TALL[:1, :16].byte()), NotImplementedError, "the rows of a must be at most MAX_SIZE"),
    (call(TALL[:1, :1], TALL, TALL[:, :16].byte()), NotImplementedError, "N must be at most MAX_SIZE = 10737"),
    (
        call(*(torch.empty(1, n, device="meta", dtype=d) for n, d in (
            (2**17 + 1, torch.int8), (2**16 + 32, torch.int8), (2**14 + 16, torch.uint8)
        ))), NotImplementedError, "K of int8 must be at most MAX_K_INT8 = 131072, got 131073",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("name", ["scale_a", "scale_b"])
def test_level_2_reads_the_scales(name, bad):
    scales = {"scale_a": S3.clone(), "scale_b": S6.clone()}
    sparse_matmul(A8, CODES, METADATA, **scales)
    scales[name][2] = bad
    sparse_matmul(A8, CODES, METADATA, **scales)
    with env.override("FUSEDOPS_VALIDATE", "2"), pytest.raises(ValueError, match=f"{name} must be finite and above 0"):
        sparse_matmul(A8, CODES, METADATA, **scales)


def test_level_2_reads_the_metadata():
    broken = METADATA.clone()
    broken[4, 7] = 0x46  # the second group of the byte is as it should be
    sparse_matmul(A, VALUES, broken)
    with env.override("FUSEDOPS_VALIDATE", "2"):
        sparse_matmul(A, VALUES, METADATA)
        message = "metadata must name two places of each group in order, got 2 and 1 in row 4, group 14"
        with pytest.raises(ValueError, match=f"sparse_matmul: {message}"):
            sparse_matmul(A, VALUES, broken)


def test_no_derivative():
    a = A.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="sparse_matmul: the result must not be differentiated"):
        sparse_matmul(a, VALUES, METADATA).sum().backward()


# ---- torch


def test_opcheck():
    opcheck("sparse_matmul", A, VALUES, METADATA, None, None, S6, torch.float32, "silu")
    opcheck("sparse_matmul", A8, CODES, METADATA, S3, S6, None, torch.bfloat16, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_fake_strides_are_the_real_ones(layout, dtype):
    a = make_tensor((4, 100), dtype, seed=0, layout=layout)
    out_dtype = torch.float16 if dtype in (torch.int8, FP8) else dtype
    assert_fake_like_real("sparse_matmul", a, VALUES.to(dtype), METADATA, None, None, S6, out_dtype, "relu")


def test_torch_compile():
    def function(a, values, metadata):
        return sparse_matmul(a, values, metadata, bias=values[:, 0] * 2, activation="relu") + 1

    assert_compiles(function, (A, VALUES, METADATA), (torch.randn(5, 100), VALUES, METADATA))
    assert_compiles(lambda a: sparse_matmul(a, CODES, METADATA, scale_b=S6), (A8,), (A8.repeat(2, 1),))


def test_cost_counts_every_byte_and_what_is_multiplied():
    told = fusedops._core.explain.operator_call(sparse_matmul, A8, CODES, METADATA, scale_a=S3, scale_b=S6, bias=S6)
    moved, operations = told[0].cost(*told[1])
    assert moved == 300 + 6 * 64 + 6 * 16 + 4 * (3 + 6 + 6) + 2 * 18 and operations == 2 * 3 * 6 * 64
