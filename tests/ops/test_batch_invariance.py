"""fusedops.batch_invariant(): a row by itself and among hostile neighbours has the same bits, for every operator."""

import functools
import re
import threading

import pytest
import torch
from hypothesis import settings

import fusedops
from fusedops import batch_invariant
from fusedops._core import env, invariance
from fusedops._core.register import operators
from fusedops._core.tuning import uses_defaults_only
from tests.ops.common import using
from tests.ops.invariance_cases import BF16, CASES, F32, FP8, N, shared

COMPILED = [(target, name) for name, case in CASES.items() for target in case.emulated]


def same_bits(one, other):
    """NaN and the sign of zero are bits as well."""
    one, other = (torch.atleast_1d(t).clone(memory_format=torch.contiguous_format) for t in (one, other))
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def row_is_its_own(case, number, seed=0):
    """Whether a row in the middle of so many has the bits that it has alone."""
    own, place = case.row(seed, None), number // 2
    rows = [case.row(seed + 10 * i, i) for i in range(number)]
    rows[place] = own
    alone, among = case.run([own]), case.run(rows)
    return all(same_bits(one[0], other[place]) for one, other in zip(alone, among, strict=True))


def deep():
    return settings.default.max_examples > 25


@pytest.mark.parametrize("name", CASES)
def test_alone_and_among_others_on_the_cpu(name):
    for number in (2, 5, 65, 512) if deep() else (2, 65):
        with using("torch"), batch_invariant():
            assert row_is_its_own(CASES[name], number), number


@pytest.mark.parametrize("name", CASES)
def test_alone_and_among_others_by_kernels(name):
    for number in (*CASES[name].many, *((33, 512) if deep() else ())):
        with using("triton"), batch_invariant():
            assert row_is_its_own(CASES[name], number), number


@pytest.mark.emulated
@pytest.mark.parametrize(("target", "name"), COMPILED)
def test_alone_and_among_others_as_compiled(target, name):
    with using(f"emulate-{target}"), batch_invariant():
        assert row_is_its_own(CASES[name], CASES[name].many[-1])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differs])
def test_without_the_mode_some_differ(name):
    """So the tests above can fail."""
    implementation, number = CASES[name].differs
    with using(implementation):
        assert not row_is_its_own(CASES[name], number)
    with using(implementation), batch_invariant(enabled=False):
        assert not row_is_its_own(CASES[name], number)


def test_plans_are_of_one_mode():
    """The same calls outside, inside and outside again: what one keeps is not used by the other."""
    case = CASES["attention decode"]
    with using("triton"):
        for on in (False, True, False, True):
            with batch_invariant(on):
                assert row_is_its_own(case, case.differs[1]) == on


def test_short_ways_on_the_cpu_are_of_one_mode():
    x = shared((5, N))
    operator = operators()["silu_mul"]
    for on in (False, True, False):
        with batch_invariant(on), torch.no_grad():
            assert (operator.direct(x) is None) == on
            fusedops.silu_mul(x, x)
            assert (operator.again(x, x) is None) == on


def test_blocks_nest_decorate_and_hold_for_every_thread():
    assert not invariance.enabled()
    with batch_invariant():
        with batch_invariant():
            pass
        assert invariance.enabled() and uses_defaults_only()
        with batch_invariant(enabled=False):
            assert invariance.enabled()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(invariance.enabled()))
        thread.start()
        thread.join()
        assert seen == [True]
    assert not invariance.enabled() and not uses_defaults_only()
    assert batch_invariant()(invariance.enabled)()
    with pytest.raises(ZeroDivisionError), batch_invariant():
        raise ZeroDivisionError
    assert not invariance.enabled() and not uses_defaults_only()


def test_blocks_of_many_threads_end_all():
    def work():
        for _ in range(20):
            with batch_invariant():
                assert invariance.enabled()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not invariance.enabled() and not uses_defaults_only()


@pytest.mark.parametrize("quantize", [fusedops.quantize_int8, fusedops.quantize_fp8])
@pytest.mark.parametrize("granularity", ["tensor", "block_2d"])
def test_scales_of_several_rows_are_refused(quantize, granularity):
    x = shared((4, 200))
    quantize(x, granularity=granularity)
    message = f"a scale of '{granularity}' is computed from several rows, which fusedops.batch_invariant"
    with batch_invariant(), pytest.raises(NotImplementedError, match=message):
        quantize(x, granularity=granularity)
    scale = torch.ones(()) if granularity == "tensor" else torch.ones(1, 2)
    with batch_invariant():
        quantize(x, granularity=granularity, scale=scale)


def test_the_reference_is_refused():
    with env.override("FUSEDOPS_BACKEND", "reference"), batch_invariant():
        with pytest.raises(NotImplementedError, match="rms_norm: the reference makes rows together"):
            fusedops.rms_norm(shared((2, 8)), None)


def test_out_and_empty_and_one_dimension():
    x, weight = shared((3, 2, N)), shared((N,))
    with batch_invariant():
        out = torch.empty(3, 2, 2 * N)[..., :N]
        assert fusedops.rms_norm(x, weight, out=out) is out
        assert same_bits(out, fusedops.rms_norm(x, weight))
        assert same_bits(out[1, 1], fusedops.rms_norm(x[1, 1], weight))
        assert fusedops.rms_norm(x[:0], weight).shape == (0, 2, N)
        assert fusedops.merge_attention(*[torch.empty(0, 3, 2, 8), torch.empty(0, 2, 3)] * 2)[0].shape == (0, 3, 2, 8)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"])
def test_configurations_do_not_see_the_batch(target):
    """On every device: what `explain` says of products and attention is the same for all numbers of rows."""

    def meta(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def config(op, *args, **kwargs):
        text = fusedops.explain(op, *args, target=target, **kwargs).config
        if "matmul" in op:  # neither rows that are padded to a tile nor loads on their way change a sum
            text = re.sub(r"(block_m|num_stages)=\d+", "", text)
        return text

    def product(op, dtype, rows):
        scales = meta(rows, dtype=F32), meta(4096, dtype=F32)
        return config(op, meta(rows, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype), *scales, out_dtype=BF16)

    def weights(rows):
        scale = meta(4096, 32)
        return config("weight_only_matmul", meta(rows, 4096), meta(4096, 2048, dtype=torch.uint8), scale)

    def decode(rows):
        return config("attention", meta(rows, 1, 32, 128), *[meta(rows, 8192, 8, 128)] * 2)

    def varlen(rows):
        starts = meta(rows + 1, dtype=torch.int32)
        packed = meta(rows * 70, 32, 128), *[meta(rows * 500, 8, 128)] * 2
        return config("attention_varlen", *packed, starts, starts, 7 * rows, 50 * rows, causal=True)

    def paged_decode(rows):
        lengths = meta(rows, dtype=torch.int32)
        cache = [meta(1024, 16, 8, 128)] * 2
        return config("paged_attention", meta(rows, 32, 128), *cache, meta(rows, 8 * rows, dtype=torch.int32), lengths)

    calls = [weights, decode, varlen, paged_decode]
    calls += [functools.partial(product, "fp8_matmul", FP8)]
    with batch_invariant():
        for call in calls:
            assert len({call(rows) for rows in (1, 2, 17, 64, 65, 512)}) == 1, call
    for call in calls:
        assert len({call(rows) for rows in (1, 2, 17, 64, 65, 512)}) > 1, call
