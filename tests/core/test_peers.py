"""Other packages beside ours: a peer that cannot run, or gives something else, is left out with its reason; and those
that are not installed here are called as their documentation says, which stand-ins check."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusedops import add_rms_norm, paged_attention, quantize_fp8

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_peer_that_fails_or_differs_is_left_out_with_its_reason(load):
    common = load("_common")

    def fails(x):
        raise TypeError("unexpected keyword argument 'page_table'\nand more")

    def in_place(x):
        return x.mul_(2)

    peers = {
        "in place": in_place, "close": lambda x: x * 2.002, "wrong": lambda x: x * 2.2, "fails": fails,
        "shape": lambda x: (x * 2)[:1], "nan": lambda x: x * float("nan"), "two": lambda x: (x * 2, x),
    }  # fmt: skip
    candidates = {"fusedops": lambda x: x * 2, **peers}
    case = common.Case("double", "4", torch.float32, lambda seed: (torch.randn(4),), candidates, {}, check=None)
    used, left_out, error = common.tried(case, graph=False)
    assert used == ["fusedops", "in place", "close"] and error is None
    assert left_out["fails"] == "TypeError: unexpected keyword argument 'page_table'"
    assert left_out["wrong"] == "its results differ from ours by 0.1" and "differ from ours by nan" in left_out["nan"]
    assert left_out["shape"] == "ValueError: its result has shape (1,), not (4,)" and "ValueError" in left_out["two"]


def test_a_peer_that_is_not_there_or_does_not_load_is_told(load, monkeypatch):
    common = load("_common")
    assert common.peer("no_such_package_anywhere", "f") is None
    assert common.UNIMPORTABLE.pop("no_such_package_anywhere").startswith("ModuleNotFoundError: No module named")
    assert common.peer("torch.nn.functional", "no_such_function") is None
    assert common.UNIMPORTABLE.pop("torch.nn.functional").startswith("AttributeError")
    assert common.peer("torch.nn.functional", "linear") is F.linear and common.VERSIONS.pop("torch")


def test_a_layout_is_made_once_for_every_weight_before_the_calls(load):
    layouts, made = load("_layouts").Layouts(), []

    def make(weight):
        made.append(weight)
        return weight * 10

    call = layouts.taking(lambda x, layout: x + layout, make)
    for seed, weight in enumerate((1, 2, 3)):
        layouts.add(seed, weight)
    assert [call(0, "ignored") for _ in range(5)] == [10, 20, 30, 10, 20] and made == [1, 2, 3]
    layouts.add(0, 7)
    assert [call(0) for _ in range(3)] == [30, 70, 20] and made == [1, 2, 3, 7, 2, 3]


def test_flashinfer_s_rotary(load, monkeypatch):
    bench = load("bench_rotary")

    def apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        assert cos_sin_cache.dtype == torch.float32 and is_neox and cos_sin_cache.is_contiguous()
        cos, sin = (half.repeat(1, 2)[positions, None] for half in cos_sin_cache.chunk(2, -1))
        turned = []
        for rows in (query, key):
            heads = rows.view(len(positions), -1, head_size)
            turned.append((heads * cos + bench.rotate_half(heads) * sin).view_as(rows))
        return tuple(turned)

    monkeypatch.setattr(bench, "FLASHINFER", apply_rope_with_cos_sin_cache)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    angle = torch.rand(1, 5, 4).repeat(1, 1, 2)
    found = bench.flashinfer(q, bench.for_flashinfer(k, angle.cos(), angle.sin()))
    torch.testing.assert_close(found, bench.formula(q, k, angle.cos(), angle.sin()))


def test_flashinfer_s_writes_into_pages(load, monkeypatch):
    bench = load("bench_write_kv_cache")

    def append_paged_kv_cache(keys, values, batch, positions, caches, indices, indptr, last_page_len, layout="NHD"):
        assert layout == "NHD" and all(t.dtype == torch.int32 for t in (batch, positions, indices, indptr))
        page_size = caches[0].shape[1]
        assert int(indptr[-1]) == len(caches[0]) == len(indices) and int(last_page_len[0]) == page_size
        for token, (sequence, position) in enumerate(zip(batch.tolist(), positions.tolist())):
            page = indices[int(indptr[sequence]) + position // page_size]
            caches[0][page, position % page_size] = keys[token]
            caches[1][page, position % page_size] = values[token]

    monkeypatch.setattr(bench, "FLASHINFER", append_paged_kv_cache)
    case = bench.write_case(20, "cpu", torch.float32, (2, 2, 8))
    arguments = case.make(0)
    copies = [a.clone() for a in arguments]
    found = bench.flashinfer(copies[0], bench.for_flashinfer(*copies[1:]))
    torch.testing.assert_close(found, tuple(case.candidates["torch"](*arguments)))


def paged_problem(load, page_size):
    bench, lengths = load("bench_paged_attention"), [37, 1, 64]
    arguments = bench.decode_case(lengths, page_size, "cpu", torch.float32, "few", sizes=(4, 2, 16)).make(0)
    return bench, lengths, arguments


@pytest.mark.parametrize("name", ["fa3", "fa2"])
def test_flash_attention_s_paged_decoding(load, monkeypatch, name):
    bench, lengths, arguments = paged_problem(load, 16)
    table_name = {"fa3": "page_table", "fa2": "block_table"}[name]

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, **more):
        return paged_attention(q.squeeze(1), k_cache, v_cache, more.pop(table_name), cache_seqlens)[:, None]

    monkeypatch.setattr(bench, f"{name.upper()}_KVCACHE", flash_attn_with_kvcache)
    torch.testing.assert_close(getattr(bench, f"{name}_kvcache")(*arguments), paged_attention(*arguments))


def test_flashinfer_s_paged_decoding(load, monkeypatch):
    bench, lengths, arguments = paged_problem(load, 16)
    plans = []

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace, kv_layout="NHD", use_tensor_cores=False):
            assert workspace.dtype == torch.uint8 and kv_layout == "NHD" and use_tensor_cores

        def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type):
            assert (num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type) == (4, 2, 16, 16, torch.float32)
            self.tables = [indices[start:end] for start, end in zip(indptr.tolist(), indptr.tolist()[1:])]
            self.lengths = [(len(t) - 1) * page_size + last for t, last in zip(self.tables, last_page_len.tolist())]
            plans.append(self.lengths)

        def run(self, q, caches):
            table = torch.nn.utils.rnn.pad_sequence(self.tables, batch_first=True)
            return paged_attention(q, *caches, table, torch.tensor(self.lengths, dtype=torch.int32))

    monkeypatch.setattr(bench, "FLASHINFER_DECODE", BatchDecodeWithPagedKVCacheWrapper)
    call = bench.flashinfer(lengths, 16, (4, 2, 16))
    for _ in range(2):
        torch.testing.assert_close(call(*arguments), paged_attention(*arguments))
    assert plans == [lengths]


def test_flashinfer_s_norm_in_place(load, monkeypatch):
    bench = load("bench_rms_norm")

    def fused_add_rmsnorm(input, residual, weight, eps=1e-6):
        assert eps == bench.EPS
        residual += input
        input.copy_(F.rms_norm(residual, weight.shape, weight, eps))

    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    wanted = add_rms_norm(x, residual, weight)
    torch.testing.assert_close(bench.in_place(fused_add_rmsnorm)(x, residual, weight), wanted)


def test_deep_gemm(load, monkeypatch):
    bench = load("bench_scaled_matmul")

    def fp8_gemm_nt(a, b, out):
        assert a[1].stride(0) == 1, "scales of a lie by columns"
        out.copy_(bench.real(*a, 1).float() @ bench.real(*b, 128).float().T)

    monkeypatch.setattr(bench, "DEEP_GEMM", fp8_gemm_nt)
    monkeypatch.setattr(bench, "DEEP_GEMM_SCALES", lambda scale: scale.T.contiguous().T)
    a, scale_a = quantize_fp8(torch.randn(5, 256), granularity="block")
    b, scale_b = quantize_fp8(torch.randn(128, 256), granularity="block_2d")
    found = bench.deep_gemm(a, bench.for_deep_gemm(a, b, scale_a, scale_b))
    wanted = bench.fp8_matmul(a, b, scale_a, scale_b)
    assert found.dtype == torch.bfloat16 and load("_common").difference(found, wanted) < 0.01


def test_sdpa_on_one_backend_and_packed_flash_attention_4(load, monkeypatch):
    bench = load("bench_attention")
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    found = bench.sdpa_forced(bench.SDPBackend.MATH, True)(q, k, v)
    torch.testing.assert_close(found, bench.attention(q, k, v, causal=True))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False):
        lengths = int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max())
        return bench.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, causal=causal), None

    monkeypatch.setattr(bench, "FA4_VARLEN", flash_attn_varlen_func)
    arguments = bench.packed_case("cpu", torch.float32).make(0)
    torch.testing.assert_close(bench.fa4_varlen(*arguments), bench.attention_varlen(*arguments, causal=True))
