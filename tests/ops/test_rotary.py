"""rotary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import rotary
from fusedops.ops.rotary import reference
from fusedops.testing import assert_accurate, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import Fault, argument_faults, standard_faults
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.common import (
    DTYPES,
    EMULATED,
    FUSED,
    IMPLEMENTATIONS,
    assert_compiles,
    assert_fake_like_real,
    gradients,
    opcheck,
    using,
)

HEAD_DIMS = (2, 6, 40, 64, 72, 80, 96, 128)


@st.composite
def problems(draw):
    """q, k, cos, sin and the pairing: grouped heads, partial rotation, any layout, one table or one for each batch."""
    dtype = draw(strategies.dtypes())
    batch, length, heads, group = (draw(st.integers(1, high)) for high in (2, 4, 3, 5))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    rotary_dim = draw(st.sampled_from([r for r in (2, 6, 20, 32, 64, head_dim) if r <= head_dim]))
    seed = draw(strategies.seeds())
    magnitude = draw(strategies.magnitudes())
    q = make_tensor((batch, length, heads * group, head_dim), dtype, seed=seed, magnitude=magnitude,
                    layout=draw(strategies.layouts(4)))  # fmt: skip
    k = make_tensor((batch, length, heads, head_dim), dtype, seed=seed + 1, magnitude=magnitude,
                    layout=draw(strategies.layouts(4)))  # fmt: skip
    tables = (draw(st.sampled_from([1, batch])), length, rotary_dim)
    table_dtype = draw(st.sampled_from([dtype, torch.float32]))
    # independent values for every element: each must meet its own
    cos, sin = (make_tensor(tables, table_dtype, seed=seed + i, layout=draw(strategies.layouts(3))) for i in (2, 3))
    return (q, k, cos, sin), draw(st.booleans())


def angles(length, size, dtype=torch.float32, start=0):
    """cos and sin of the usual frequencies, one value for each pair, laid out for halves."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(start, start + length, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def transposed(length, heads, dim, seed, dtype=torch.float32):
    """[B, S, H, D] as a model has it: heads outside, positions inside."""
    return make_tensor((2, heads, length, dim), dtype, seed=seed).transpose(1, 2)


# ---- accuracy


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(problem=problems())
def test_rotary(implementation, problem):
    tensors, interleaved = problem
    with using(implementation):
        results = rotary(*tensors, interleaved=interleaved)
    expected = reference.rotary(*(t.double() for t in tensors), interleaved)
    for result, wanted, x in zip(results, expected, tensors[:2], strict=True):
        assert_accurate(result, wanted, zeros=False)  # the two products may cancel, so an exact zero is luck
        size = tensors[2].shape[-1]
        assert torch.equal(result[..., size:], x[..., size:])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@given(problem=problems())
def test_gradients(implementation, problem):
    (q, k, cos, sin), interleaved = problem
    grads = make_tensor(q.shape, q.dtype, seed=7), make_tensor(k.shape, q.dtype, seed=8)
    with using(implementation):
        found = gradients(lambda q, k: rotary(q, k, cos, sin, interleaved=interleaved), (q, k), grads)
    wide = cos.double(), sin.double()
    expected = gradients(
        lambda q, k: reference.rotary(q, k, *wide, interleaved), (q.double(), k.double()), [g.double() for g in grads]
    )
    for result, wanted in zip(found, expected, strict=True):
        assert_accurate(result, wanted, zeros=False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradcheck(interleaved):
    q, k = (make_tensor((1, 2, heads, 6), torch.float64, seed=heads).requires_grad_() for heads in (2, 1))
    cos, sin = (make_tensor((1, 2, 4), torch.float64, seed=seed) for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda q, k: reference.rotary(q, k, cos, sin, interleaved), (q, k))
    grads = make_tensor(q.shape, q.dtype, seed=5), make_tensor(k.shape, q.dtype, seed=6)
    automatic = gradients(lambda q, k: reference.rotary(q, k, cos, sin, interleaved), (q, k), grads)
    for written, wanted in zip(reference.rotary_backward(*grads, cos, sin, interleaved), automatic, strict=True):
        torch.testing.assert_close(written, wanted)


# ---- properties


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
def test_rotation_keeps_length_and_depends_on_distance_alone(implementation):
    q, k = make_tensor((1, 1, 1, 64), torch.float32, seed=0), make_tensor((1, 1, 1, 64), torch.float32, seed=1)

    def score(position_q, position_k):
        turned_q, _ = rotary(q, q, *angles(1, 64, start=position_q))
        turned_k, _ = rotary(k, k, *angles(1, 64, start=position_k))
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum()

    with using(implementation):
        torch.testing.assert_close(score(5, 3), score(105, 103), rtol=1e-4, atol=1e-4)
        assert abs(score(5, 3) - score(5, 4)) > 0.1


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_angles(implementation, dtype):
    """No angle changes nothing; a quarter turn moves every element to its partner, exactly."""
    q, k = (make_tensor((2, 3, heads, 16), dtype, seed=heads) for heads in (4, 2))
    zero, one = torch.zeros(1, 3, 16), torch.ones(1, 3, 16)
    with using(implementation):
        same_q, same_k = rotary(q, k, one, zero)
        quarter, _ = rotary(q, k, zero, one)
        neighbours, _ = rotary(q, k, zero, one, interleaved=True)
    assert torch.equal(same_q, q) and torch.equal(same_k, k)
    assert torch.equal(quarter, torch.cat((-q[..., 8:], q[..., :8]), -1))
    assert torch.equal(neighbours, torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2))


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
@given(problem=problems())
def test_layout_does_not_matter(implementation, problem):
    tensors, interleaved = problem
    before = [t.clone() for t in tensors]
    with using(implementation):
        views = rotary(*tensors, interleaved=interleaved)
        copies = rotary(*(t.contiguous() for t in tensors), interleaved=interleaved)
        alone = rotary(tensors[0][:1, :1, :1], tensors[1][:1, :1, :1], tensors[2][:1, :1], tensors[3][:1, :1],
                       interleaved=interleaved)  # fmt: skip
    for view, copy, single in zip(views, copies, alone, strict=True):
        assert torch.equal(view, copy) and torch.equal(single, view[:1, :1, :1])
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_hugging_face_formula(interleaved):
    """The formula as Llama's and GLM's models write it."""
    q, k, (cos, sin) = transposed(5, 4, 32, 0), transposed(5, 2, 32, 1), angles(5, 32)
    if interleaved:
        cos, sin = (t[..., :16].repeat_interleave(2, -1) for t in (cos, sin))
        rotate = lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)  # noqa: E731
    else:
        rotate = lambda x: torch.cat((-x[..., 16:], x[..., :16]), -1)  # noqa: E731
    for result, x in zip(rotary(q, k, cos, sin, interleaved=interleaved), (q, k), strict=True):
        torch.testing.assert_close(result, x * cos.unsqueeze(2) + rotate(x) * sin.unsqueeze(2))


@pytest.mark.parametrize("implementation", [*FUSED, *EMULATED])
def test_offsets_beyond_int32(implementation):
    """B12, B18: batches more than 2**31 elements apart (triton-lang/triton#832, Dao-AILab/flash-attention#772)."""
    values = make_tensor((2, 32), torch.float16, seed=0)
    far, near = (t.view(2, 1, 1, 32) for t in (huge_stride_rows(values, last_offset=2**31 + 1), values))
    with using(implementation):
        assert torch.equal(rotary(far, far, *angles(1, 32))[0], rotary(near, near, *angles(1, 32))[0])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *EMULATED])
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(implementation, shape):
    q, k = torch.empty(shape), torch.empty(*shape[:2], 1, 8)
    cos, sin = angles(shape[1], 8)
    with using(implementation):
        out_q, out_k = rotary(q, k, cos, sin)
    assert out_q.shape == q.shape and out_k.shape == k.shape


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_faults_are_rejected(dtype, interleaved):
    q, k = (make_tensor((1, 5, heads, 40), dtype, seed=heads) for heads in (3, 1))
    cos, sin = (make_tensor((1, 5, 38), torch.float32, seed=seed) for seed in (2, 3))

    def correct(q, k, cos, sin, interleaved=interleaved):
        return rotary(q, k, cos, sin, interleaved=interleaved)

    def check(candidate):
        expected = reference.rotary(*(t.double() for t in (q, k, cos, sin)), interleaved)
        for result, wanted in zip(candidate(q, k, cos, sin), expected, strict=True):
            assert_accurate(result, wanted)

    faults = standard_faults(correct, output=0)
    faults += argument_faults(correct, 2, "cos") + argument_faults(correct, 3, "sin")
    faults += [
        Fault("cos and sin swapped", lambda q, k, cos, sin: correct(q, k, sin, cos)),
        Fault("k not rotated", lambda q, k, cos, sin: (correct(q, k, cos, sin)[0], k)),
        Fault("position off by one", lambda q, k, cos, sin: correct(q, k, cos.roll(1, 1), sin.roll(1, 1))),
        Fault("whole head rotated", lambda q, k, *both: correct(q, k, *(torch.cat((t, t[..., :2]), -1) for t in both))),
        Fault("other pairing", lambda q, k, cos, sin: correct(q, k, cos, sin, interleaved=not interleaved)),
    ]
    assert_faults_rejected(check, correct, faults)


# ---- rejects

Q, K, C = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8), torch.ones(1, 3, 8)
REJECTS = [
    (lambda: rotary(None, K, C, C), TypeError, "rotary: q must be a torch.Tensor, got NoneType"),
    (lambda: rotary(Q[0], K, C, C), ValueError, r"rotary: q must have shape \[B, S, H, D\], got \[3, 4, 8\]"),
    (lambda: rotary(Q, K[:, :2], C, C), ValueError, r"k must have shape .* with B=2, S=3, D=8, got \[2, 2"),
    (lambda: rotary(Q, K[..., :6], C, C), ValueError, r"k must have shape .* got \[2, 3, 1, 6\]"),
    (lambda: rotary(Q, K, C[:, :2], C), ValueError, r"cos must have shape \[C, S, R\] with S=3, got \[1, 2, 8\]"),
    (lambda: rotary(Q, K, C, C[..., :4]), ValueError, r"sin must have shape .* got \[1, 3, 4\]"),
    (lambda: rotary(Q, K, *[C.expand(3, 3, 8).contiguous()] * 2), ValueError, "first size 1 or B=2, got 3"),
    (lambda: rotary(Q, K, C[..., :3], C[..., :3]), ValueError, "even last size from 2 to D=8, got 3"),
    (lambda: rotary(Q, K, *[torch.ones(1, 3, 10)] * 2), ValueError, "even last size from 2 to D=8, got 10"),
    (lambda: rotary(Q, K, C[..., :0], C[..., :0]), ValueError, "even last size from 2 to D=8, got 0"),
    (lambda: rotary(Q.double(), K, C, C), TypeError, "q must be float16, bfloat16 or float32, got float64"),
    (lambda: rotary(Q, K.half(), C, C), TypeError, "k must be float32, got float16"),
    (lambda: rotary(Q.half(), K.half(), C.bfloat16(), C), TypeError, "cos must be float16 or float32, got bfloat16"),
    (lambda: rotary(Q, K, C.to("meta"), C), ValueError, "cos must be on cpu, got meta"),
    (lambda: rotary(Q.transpose(2, 3).contiguous().transpose(2, 3), K, C, C), ValueError, "q must have a contig"),
    (lambda: rotary(Q, K, C.clone().requires_grad_(), C), NotImplementedError, "must not require gradients"),
    (lambda: rotary(*[torch.ones(1, 3, 1, 1026)] * 2, C, C), NotImplementedError, "D must be at most MAX_D = 1024"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- torch


def arguments(dtype=torch.float32, grad=False):
    q, k = (transposed(5, heads, 18, heads, dtype).requires_grad_(grad) for heads in (4, 2))
    return q, k, *angles(5, 16, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, interleaved):
    opcheck("rotary", *arguments(grad=grad), interleaved)
    opcheck("rotary_backward", *arguments(grad=grad), interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "sliced", "expanded"])
def test_fake_strides_are_the_real_ones(dtype, layout):
    """B56: an output's strides under tracing are those of the real call (pytorch/pytorch#182328)."""
    q, k = (make_tensor((2, 5, heads, 18), dtype, seed=heads, layout=layout) for heads in (4, 2))
    for interleaved in (False, True):
        assert_fake_like_real("rotary", q, k, *angles(5, 16), interleaved)
        assert_fake_like_real("rotary_backward", q, k, *angles(5, 18), interleaved)


def test_torch_compile():
    def function(q, k, cos, sin):
        out_q, out_k = rotary(q * 2, k, cos, sin)
        return rotary(out_q, out_k, cos, sin, interleaved=True)

    other = (transposed(9, 6, 32, 0), transposed(9, 3, 32, 1), *angles(9, 32))
    assert_compiles(function, arguments(), other)
    q, k, cos, sin = arguments(grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    grads = (torch.ones_like(q), torch.ones_like(k))
    found = torch.autograd.grad(compiled(q, k, cos, sin), (q, k), grads)
    torch.testing.assert_close(found, torch.autograd.grad(function(q, k, cos, sin), (q, k), grads))


def test_second_derivative_is_the_rotation_again():
    q, k, cos, sin = (t.double().float() for t in arguments())
    q.requires_grad_()
    grad = torch.ones_like(q).requires_grad_()
    out, _ = rotary(q, k, cos, sin)
    (dq,) = torch.autograd.grad(out, q, grad, create_graph=True)
    (again,) = torch.autograd.grad(dq, grad, q.detach())
    torch.testing.assert_close(again, out.detach())
