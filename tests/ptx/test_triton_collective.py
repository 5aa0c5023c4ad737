"""Triton kernels whose threads exchange values, run on the CPU; integers and moves exactly, sums within a budget."""

import pytest
import torch

from fusedops.testing import assert_accurate, ptx
from tests.ptx.kernels import collective

TARGETS = pytest.mark.parametrize("target", ("sm_80", "sm_90a"))


def integers(*shape, low=-1000, high=1000, dtype=torch.int32):
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@TARGETS
@pytest.mark.parametrize("reverse", (False, True))
def test_linear_recurrence(reverse, target):
    a, b = floats(2, 256).sigmoid(), floats(2, 256)
    out = torch.empty_like(a)
    ptx.run(collective.scan_kernel, (2,), a, b, out, N=256, REVERSE=reverse, target=target)
    truth, h = torch.empty(2, 256, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for i in range(255, -1, -1) if reverse else range(256):
        h = a[:, i].double() * h + b[:, i].double()
        truth[:, i] = h
    assert_accurate(out, truth)


@TARGETS
def test_cumulative_sums_and_products(target):
    x = integers(4, 128, dtype=torch.int64)
    total, product = torch.empty_like(x), torch.empty_like(x)
    ptx.run(collective.cumulative_kernel, (1,), x, total, product, ROWS=4, N=128, target=target)
    assert torch.equal(total, x.cumsum(1))
    assert torch.equal(product, x.cumprod(1))  # modulo 2**64


@TARGETS
@pytest.mark.parametrize("descending", (False, True))
def test_sort(descending, target):
    x = floats(2, 64)
    out = torch.empty_like(x)
    ptx.run(collective.sort_kernel, (1,), x, out, ROWS=2, N=64, DESCENDING=descending, target=target)
    assert torch.equal(out, x.sort(1, descending=descending).values)


@TARGETS
def test_reductions_with_an_index(target):
    x = floats(3, 200).round(decimals=1)  # some values are there more than once
    value, index, bits = torch.empty(3), torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    ptx.run(collective.argmax_kernel, (3,), x, value, index, bits, 200, BLOCK=256, target=target)
    assert torch.equal(value, x.amax(1))
    assert index.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]
    expected = torch.zeros(3, dtype=torch.int32)
    for column in x.view(torch.int32).unbind(1):
        expected ^= column
    assert torch.equal(bits, expected)


@TARGETS
def test_histogram(target):
    x, out = integers(300, low=0, high=32), torch.zeros(32, dtype=torch.int32)
    ptx.run(collective.histogram_kernel, (3,), x, out, 300, BLOCK=128, BINS=32, target=target)
    assert torch.equal(out, torch.bincount(x, minlength=32).int())


@TARGETS
def test_integer_atomics_and_a_lock(target):
    x = integers(300)
    results = [torch.zeros(8, dtype=torch.int32) for _ in range(5)]
    ticket = torch.zeros(2, dtype=torch.int32)
    ptx.run(collective.atomics_kernel, (3,), x, *results, ticket, 300, BLOCK=128, target=target)
    expected = torch.zeros(5, 8, dtype=torch.int32)
    for i, value in enumerate(x):
        old = expected[:, i % 8].clone()
        new = (old[0] + value, max(old[1], value), min(old[2], value), old[3] | value, old[4] ^ value)
        expected[:, i % 8] = torch.stack(new)
    assert torch.equal(torch.stack(results), expected)
    assert ticket.tolist() == [0, 3]


@TARGETS
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_floating_atomics(dtype, target):
    x, out = integers(256, low=-2, high=3).to(dtype), torch.zeros(4, dtype=dtype)
    ptx.run(collective.float_atomics_kernel, (2,), x, out, BLOCK=128, target=target)
    assert torch.equal(out, x.double().reshape(-1, 4).sum(0).to(dtype))  # small integers: exact in any order


@TARGETS
def test_gather(target):
    x, index = floats(32, 16), integers(32, 16, low=0, high=32)
    out = torch.empty_like(x)
    ptx.run(collective.gather_kernel, (1,), x, index, out, ROWS=32, N=16, target=target)
    assert torch.equal(out, x.gather(0, index.long()))


@TARGETS
def test_transpose_and_interleave(target):
    x, out = floats(32, 64), torch.empty(64, 64)
    ptx.run(collective.transpose_kernel, (1,), x, out, M=32, N=64, target=target)
    assert torch.equal(out, torch.stack((x.T, -x.T), 2).flatten(1))


def test_tuples_of_pointers_and_sizes():
    x, out = integers(128), torch.zeros(128, dtype=torch.int32)
    ptx.run(collective.tuple_kernel, (1,), (x, out), (100, 3), BLOCK=128)
    assert torch.equal(out[:100], 3 * x[:100])
    assert not out[100:].any()


def test_a_device_assertion_stops_the_run_with_its_text():
    x = integers(128, low=0)
    x[77] = -1
    with pytest.raises(ptx.Fault, match="thread 77 (.|\n)*values must not be negative(.|\n)*schedule: default"):
        ptx.run(collective.assert_kernel, (1,), x, torch.empty_like(x), BLOCK=128, debug=True)


def test_what_a_kernel_prints(capfd):
    x = integers(128, low=0)
    ptx.run(collective.assert_kernel, (1,), x, torch.empty_like(x), BLOCK=128, debug=True, schedules="ahead")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 128
    assert f"pid (0, 0, 0) idx ( 77) x is: {x[77]}" in lines
