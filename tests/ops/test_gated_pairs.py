"""gated=True of int8_matmul, fp8_matmul and weight_only_matmul: each gate's row of the weight stands before its up."""

import pytest
import torch

import fusedops
from fusedops import interleave_rows, weight_only_matmul
from fusedops.testing import Fault, assert_accurate, assert_faults_rejected, make_tensor
from fusedops.testing.faults import standard_faults
from tests.ops.common import (
    EMULATED,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    assert_rejected,
    opcheck,
    using,
)
from tests.ops.matmul_problems import FP8, OPERATORS, call_of
from tests.ops.weight_problems import truth_of, weight_of

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
OPS = [*OPERATORS, "weight_only_matmul"]
ACTIVATION = torch.nn.functional.gelu


def operands(op, seed, rows=5, columns=38, depth=400, dtype=torch.float32):
    """(x or a, the weight, then its tables by rows), all of them one projection's, and a bias."""
    bias = make_tensor((columns,), torch.float32, seed=seed + 5)
    if op == "weight_only_matmul":
        x = make_tensor((rows, depth), dtype, seed=0)
        values, scale, zero = weight_of("int4 group", columns, depth, 64, seed)
        return [x], [values, scale], {"zero": zero, "bias": bias}
    a, b, scale_a, scale_b = call_of(op, rows, columns, depth, seed=seed).args
    a = call_of(op, rows, columns, depth).args[0]
    return [a], [b, scale_a / 3e5, scale_b], {"bias": bias}


def run(op, x, weight, options, **more):
    """A call of the operator; of x and a scale for its rows, those come as the operator has them."""
    dtypes = {} if op == "weight_only_matmul" else {"out_dtype": torch.float32}
    return getattr(fusedops, op)(*x, *weight, **options, **dtypes, **more)


def joined(op, gate, up):
    """Both projections as one weight: what has its rows is interleaved, the scale of a's rows is the gate's."""
    (x, weights, tables), (_, others, other_tables) = gate, up
    pairs = [w if op != "weight_only_matmul" and i == 1 else interleave_rows(w, v)
             for i, (w, v) in enumerate(zip(weights, others, strict=True))]  # fmt: skip
    return x, pairs, {name: interleave_rows(tables[name], other_tables[name]) for name in tables}


# ---- accuracy


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("op", OPS)
def test_pairs_are_the_two_products(op, implementation):
    """Bitwise in float32."""
    gate, up = operands(op, 1), operands(op, 2)
    up[1][1:2] = gate[1][1:2] if op != "weight_only_matmul" else up[1][1:2]  # a has one scale
    with using(implementation):
        plain = run(op, *gate, activation="relu"), run(op, *up)
        found = run(op, *joined(op, gate, up), activation="relu", gated=True)
    assert torch.equal(found, plain[0] * plain[1]) and found.count_nonzero() > 50


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("rows", [5, 70])
def test_blocks_are_of_the_rows_as_they_stand(rows, implementation):
    """A block's 128 rows are 64 gates and 64 ups, and the last block may end anywhere."""
    call = call_of("fp8_matmul", rows, 150, 300, ("block", "block"), activation="silu", residual=True, gated=True)
    with using(implementation):
        assert_accurate(call.run(), call.truth(), zeros=False)
        values, scale, _ = weight_of("fp8 block", 150, 300, seed=4)
        x = make_tensor((rows, 300), torch.float32, seed=1)
        out = weight_only_matmul(x, values, scale, activation="silu", gated=True)
        assert_accurate(out, truth_of(x, values, scale, activation="silu", gated=True), zeros=False)  # exp vanishes


@pytest.mark.parametrize("implementation", EMULATED)
def test_rows_of_int8_never_depend_on_their_batch(implementation):
    """Three kernels of compiled code, of which none may round otherwise: no product becomes part of a sum."""
    call = call_of("int8_matmul", 70, 40, 704, bias=torch.float32, activation="gelu", residual=True, gated=True)
    with using(implementation):
        whole = call.run()
        for chosen in (slice(0, 1), slice(2, 69)):
            assert torch.equal(call.rows(chosen).run(), whole[chosen])


# ---- what the tests find


def pair_faults(correct):
    """Wrong pairs, of a function of everything by name."""

    def of_rows(change):
        """The same change of all that has the weight's rows."""

        def wrong(**given):
            for name in ("b", "values", "scale_b", "scale", "zero", "bias"):
                if given.get(name) is not None:
                    moved = given[name].view(torch.uint8) if given[name].dtype == FP8 else given[name]
                    given[name] = change(moved).view(given[name].dtype)
            return correct(**given)

        return wrong

    def halves(table):
        """Gates first, then ups, as unfused weights are joined."""
        return table.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)

    def plain(**given):
        """The product with its bias alone."""
        return correct(**given | {"activation": None, "residual": None, "gated": False})

    def of_product(change):
        def wrong(**given):
            out = change(*plain(**given).double().unflatten(-1, (-1, 2)).unbind(-1), given["residual"].double())
            return out.to(given["residual"].dtype)

        return wrong

    f = ACTIVATION
    return [Fault(name, wrong) for name, wrong in {
        "gate and up swapped": of_rows(lambda t: t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)),
        "pair shifted by one": of_rows(lambda t: t.roll(1, 0)),
        "pair before": of_rows(lambda t: t.roll(2, 0)),
        "halves instead of pairs": of_rows(halves),
        "activation on both": of_product(lambda g, u, r: f(g) * f(u) + r),
        "activation on the up": of_product(lambda g, u, r: g * f(u) + r),
        "activation lost": of_product(lambda g, u, r: g * u + r),
        "activation of the pair": of_product(lambda g, u, r: f(g * u) + r),
        "up lost": of_product(lambda g, u, r: f(g) + r),
        "gate lost": of_product(lambda g, u, r: u + r),
        "gate plus up": of_product(lambda g, u, r: f(g) + u + r),
        "gate twice": of_product(lambda g, u, r: f(g) * g + r),
        "residual on the gate": of_product(lambda g, u, r: (f(g) + r) * u),
        "residual on the up": of_product(lambda g, u, r: f(g) * (u + r)),
        "residual of the next pair": of_product(lambda g, u, r: f(g) * u + r.roll(1, -1)),
        "bias of the gate for both": lambda **given: correct(
            **given | {"bias": given["bias"][::2].repeat_interleave(2)}),
        "bias of the up for both": lambda **given: correct(
            **given | {"bias": given["bias"][1::2].repeat_interleave(2)}),
        "rounded before the residual": of_product(lambda g, u, r: (f(g) * u).bfloat16().double() + r),
    }.items()]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_planted_faults_are_rejected(op):
    if op == "weight_only_matmul":
        values, scale, zero = weight_of("int4 group", 78, 300, 64, seed=4)
        given = {"x": make_tensor((5, 300), torch.float32, seed=1), "values": values, "scale": scale, "zero": zero}
        given |= {"bias": make_tensor((78,), torch.float32, seed=2), "activation": "gelu", "gated": True}
        given["residual"] = make_tensor((5, 39), torch.float32, seed=3)
        operands_of, truth = ("x", "values", "scale"), truth_of(**given)
    else:
        call = call_of(op, 5, 78, 300, bias=torch.float32, activation="gelu", residual=True, gated=True)
        operands_of, truth = ("a", "b", "scale_a", "scale_b"), call.truth()
        given = dict(zip(operands_of, call.args)) | call.options

    def correct(**given):
        first = [given.pop(name) for name in operands_of]
        return getattr(fusedops, op)(*first, **given)

    def check(candidate):
        assert_accurate(candidate(**given), truth, zeros=False)

    assert_faults_rejected(check, correct, [*pair_faults(correct), *standard_faults(correct)])


# ---- rejects

A, B, ONE = torch.ones(3, 40, dtype=torch.int8), torch.ones(6, 40, dtype=torch.int8), torch.tensor(1.0)
X, R = torch.ones(3, 40), torch.ones(3, 6)


def int8(b=B, gated=True, activation="silu", **options):
    return lambda: fusedops.int8_matmul(A, b, ONE, ONE, gated=gated, activation=activation, **options)


def weigh(b=B, gated=True, activation="silu", **options):
    return lambda: weight_only_matmul(X, b, ONE, gated=gated, activation=activation, **options)


REJECTS = [
    (int8(gated=1), TypeError, "int8_matmul: gated must be a bool, got int"),
    (int8(gated=None), TypeError, "int8_matmul: gated must be a bool, got NoneType"),
    (int8(activation=None), ValueError, "activation of gated pairs must be one of 'silu', .*, got None"),
    (int8(B[:5]), ValueError, "int8_matmul: N must be even where gated=True, got 5"),
    (int8(residual=R.bfloat16()), ValueError, r"residual must have N / 2 columns .* N=6, got \[3, 6\]"),
    (int8(residual=torch.ones(2, 3)), ValueError, r"residual must have shape \[M, half\] with M=3, got \[2, 3\]"),
    (int8(bias=torch.ones(3)), ValueError, r"bias must have shape \[N\] with N=6, got \[3\]"),
    (weigh(gated="yes"), TypeError, "weight_only_matmul: gated must be a bool, got str"),
    (weigh(activation=None), ValueError, "activation of gated pairs must be one of 'silu', .*, got None"),
    (weigh(B[:5]), ValueError, "weight_only_matmul: N must be even where gated=True, got 5"),
    (weigh(residual=R), ValueError, r"residual must have N / 2 columns .* N=6, got \[3, 6\]"),
    (lambda: interleave_rows([1], X), TypeError, "interleave_rows: gate must be a torch.Tensor, got list"),
    (lambda: interleave_rows(ONE, ONE), ValueError, r"interleave_rows: gate must have rows, got shape \[\]"),
    (lambda: interleave_rows(X, A), TypeError, "interleave_rows: up must be torch.float32, got torch.int8"),
    (lambda: interleave_rows(X, X[:2]), ValueError, r"up must have shape \[3, 40\] on cpu, got \[2, 40\] on cpu"),
    (lambda: interleave_rows(X, X.to("meta")), ValueError, r"up must have shape \[3, 40\] on cpu, got .* on meta"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


# ---- torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.uint8, FP8], ids=str)
def test_rows_are_interleaved(dtype):
    gate, up = (make_tensor((3, 2), torch.float32, seed=i, magnitude=9.0).to(dtype) for i in range(2))
    found = interleave_rows(gate, up)
    assert found.dtype == dtype and found.is_contiguous()
    for wanted, rows in ((gate, found[::2]), (up, found[1::2])):
        assert torch.equal(rows.float(), wanted.float())
    assert interleave_rows(gate[:, 0], up[:, 0]).shape == (6,) and interleave_rows(gate[:0], up[:0]).shape == (0, 2)


def test_operators_as_torch_sees_them():
    scaled = A, B, ONE, ONE, None, torch.float32, "gelu", R[:, :3], True
    weighed = X, B, ONE, None, None, R[:, :3], "gelu", True
    for op, args in (("int8_matmul", scaled), ("weight_only_matmul", weighed)):
        opcheck(op, *args)
        assert_fake_like_real(op, *args)


def test_torch_compile():
    def function(x, values, scale):
        return weight_only_matmul(x, values, scale, activation="silu", residual=x[:, :3], gated=True) + 1

    assert_compiles(function, (X, B, ONE), (torch.randn(5, 40), B, ONE))


def test_cost_counts_half_the_columns():
    told = fusedops.explain("int8_matmul", A, B, ONE, ONE, activation="silu", gated=True)
    assert told.bytes == 3 * 40 + 6 * 40 + 8 + 2 * 9 and told.operations == 2 * 3 * 6 * 40
    told = fusedops.explain("weight_only_matmul", X, B, ONE, activation="silu", residual=R[:, :3], gated=True)
    assert told.bytes == 4 * 3 * 40 + 6 * 40 + 4 + 4 * 2 * 9 and told.operations == 2 * 3 * 6 * 40
