"""Warm-up: afterwards a patched model compiles nothing, which a count of compilations shows; and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops.patch import joined
from fusedops.patch.skeleton import skeleton
from fusedops.warm import calls, listing, pool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
BATCH, TOKENS = "2", "5"  # as few kernels as show everything, padding on pages too


def started(cache, *arguments):
    """stdout and stderr of a module run without the interpreter, on caches of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton"), "FUSEDOPS_CACHE_DIR": str(cache / "ours")}
    ended = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def warmed(cache, config, *options):
    started(cache, "fusedops", "warmup", "--model", config, "--json", cache / "done.json", *options)
    return json.loads((cache / "done.json").read_text())


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A folder of caches with the kernels of TINY, and what the first warm-up said."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "config.json").write_text(json.dumps(TINY))
    limits = "--target", "sm_90a", "--max-batch", BATCH, "--max-seqlen", TOKENS
    return folder, limits, warmed(folder, folder, *limits)


@pytest.mark.compile
def test_a_run_of_the_model_compiles_nothing(warm, tmp_path):
    folder, _, done = warm
    assert done["compiled"] == done["kernels"] > 10 and done["failed"] == {} and done["left"] == {}
    worker = "tests.data.warm_worker", folder / "config.json", "sm_90a", BATCH, TOKENS
    ran = json.loads(started(folder, *worker, 10))
    assert ran["errors"] == [] and ran["compiled"] == [] and len(ran["done"]) == 10
    assert all(any(kind in one for one in ran["done"]) for kind in (" paged", " padded", " padded paged"))
    assert {"_attention_kernel", "_paged_attention_kernel", "_rms_norm_kernel"} < ran["launches"].keys()
    cold = json.loads(started(tmp_path, *worker, 1))
    assert len(cold["errors"]) == 1 and cold["compiled"] == [] and cold["found"] == 0


@pytest.mark.compile
def test_a_second_warm_up_compiles_what_is_missing_alone(warm):
    folder, limits, done = warm
    again = warmed(folder, folder / "config.json", *limits)
    assert (again["kernels"], again["compiled"]) == (done["kernels"], 0) and again["seconds"] < 5
    next((folder / "triton").glob("*/_rms_norm_kernel.cubin")).unlink()
    repaired = warmed(folder, folder, *limits)
    assert (repaired["kernels"], repaired["compiled"]) == (done["kernels"], 1)


@pytest.mark.deep
@pytest.mark.compile
@pytest.mark.parametrize(
    ("options", "kinds", "kernel"),
    [
        (("--sparsity", "2:4"), ("sparse",), "_sparse_matmul_kernel"),
        (("--page-size", "8"), ("page=8",), "_paged_attention_kernel"),
        (("--gradients",), ("gradients",), "_attention_dkdv_kernel"),
    ],
)
def test_what_is_asked_for_compiles_nothing_later(options, kinds, kernel, tmp_path):
    """Without the option something would have to be compiled."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    limits = "--target", "sm_90a", "--max-batch", BATCH, "--max-seqlen", TOKENS
    worker = "tests.data.warm_worker", tmp_path / "config.json", "sm_90a", BATCH, TOKENS, 10, *kinds
    warmed(tmp_path, tmp_path, *limits)
    assert json.loads(started(tmp_path, *worker))["errors"]
    done = warmed(tmp_path, tmp_path, *limits, *options)
    assert done["compiled"] > 0 and done["failed"] == {} and done["left"] == {}
    ran = json.loads(started(tmp_path, *worker))
    assert ran["errors"] == [] and ran["compiled"] == [] and kernel in ran["launches"]


@pytest.mark.deep
@pytest.mark.compile
@pytest.mark.parametrize("name", ["smollm2_135m", "llama_3_1_8b"])
def test_whole_models(name, tmp_path):
    config, begun = CONFIGS / f"{name}.json", time.perf_counter()
    done = warmed(tmp_path, config, "--target", "sm_90a", "--max-batch", "8", "--max-seqlen", "4096")
    assert done["compiled"] == done["kernels"] > 100 and done["failed"] == {} and done["left"] == {}
    print(f"{name}: {done['kernels']} kernels, {time.perf_counter() - begun:.0f} s")
    again = warmed(tmp_path, config, "--target", "sm_90a", "--max-batch", "8", "--max-seqlen", "4096")
    assert (again["kernels"], again["compiled"]) == (done["kernels"], 0) and again["seconds"] < 5


@pytest.mark.deep
@pytest.mark.parametrize("name", ["smollm2_135m", "llama_3_1_8b"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_no_shape_within_the_limits_needs_another_kernel(name, target, tmp_path):
    found = started(tmp_path, "tests.data.warm_draws", CONFIGS / f"{name}.json", target, 8, 4096, 300)
    assert json.loads(found)["left_out"] == []


@pytest.mark.parametrize("options", [{"sparsity": "2:4"}, {"scheme": "int8"}, {"scheme": "int4-weight-only"}])
def test_linears_without_memory_are_joined_as_loaded_ones(options, tmp_path):
    """Else the kernels behind them would get rows that lie otherwise."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": 128, "intermediate_size": 256}))
    model = skeleton(tmp_path / "config.json", torch.bfloat16, **options)
    groups = {id(state.group): state.group for module in model.modules() if (state := _joined_state(module))}
    assert groups and all(group.apart == "" for group in groups.values())
    assert sorted(len(group.members) for group in groups.values())[-2:] == [3, 3]
    assert not joined._all_on_meta


def _joined_state(module):
    state = vars(module).get("_fusedops")
    return state if hasattr(state, "group") else None


@pytest.mark.parametrize("told", [{"scheme": None, "sparsity": "2:4"}, {"scheme": "int8", "sparsity": None}])
def test_a_config_tells_what_its_checkpoint_holds(told, tmp_path):
    """As `FusedOpsConfig` writes it; arguments come first, and what others have quantised is none of ours."""
    def kinds(quantization, **options):
        (tmp_path / "config.json").write_text(json.dumps({**TINY, "quantization_config": quantization}))
        model = skeleton(tmp_path / "config.json", torch.bfloat16, **options)
        return {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}

    expected = "Sparse24Linear" if told["sparsity"] else "Int8Linear"
    ours = {"quant_method": "fusedops", "group_size": None, "modules_to_not_convert": ["lm_head", "q_proj"], **told}
    assert kinds(ours) == kinds(None, **told) == {"Linear", expected}
    assert kinds({"quant_method": "gptq", "bits": 4}) == {"Linear"}
    with pytest.raises(ValueError, match="warmup: group_size must be None"):
        kinds({**ours, "group_size": 32})


def test_totals_of_padded_batches():
    assert calls._totals(1, 9) == [] and calls._totals(2, 1) == [] and calls._totals(2, 2) == [3]
    assert calls._totals(2, 9) == [16, 10] and calls._totals(8, 4096) == [4112, 4103]


def test_shapes_cover_every_class():
    for most in (2, 3, 16, 17, 100, 4096):
        found = calls.lengths(most)
        assert found == sorted(set(found)) and found[0] == 1 and found[-1] == most
        assert most < 16 or {15, 16} <= set(found)
    assert calls.batches(20)[:8] == [1, 2, 3, 4, 5, 6, 7, 8] and calls.batches(20)[-1] == 20
    assert calls.lengths(1) == [1] and calls.lengths(0) == []


@pytest.mark.parametrize("text", ["", "[]", '{"kernels": 1}', '{"kernels": [["a", "zz"]], "left": {}}'])
def test_a_listing_that_cannot_be_read_is_made_again(text, tmp_path, monkeypatch):
    monkeypatch.setattr(listing.env, "cache_dir", lambda: tmp_path)
    kept = listing.Listing("key")
    kept.write([("a", "00")], {})
    assert kept.read() == ([["a", "00"]], {})
    (tmp_path / "warmup" / "key.json").write_text(text)
    assert kept.read() == (None, {})


def test_a_process_that_dies_is_an_error(monkeypatch):
    ended = [sys.executable, "-c", "import os; os._exit(1)"]
    monkeypatch.setattr(
        pool, "_start", lambda: subprocess.Popen(ended, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="a compiling process ended by itself"):
        pool.compile_all(["job"] * 3, 2, False, lambda *args: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "missing"}, "model must be a config.json or a directory that holds one, got missing"),
        ({"dtype": torch.int8}, "dtype must be float16, bfloat16 or float32, got torch.int8"),
        ({"max_batch": 0}, "max_batch must be a positive number"),
        ({"page_size": 12}, "page_size must be 1 or a multiple of 8 up to 256, got 12"),
        ({"sparsity": "4:8"}, "sparsity must be None or '2:4', got '4:8'"),
        ({"scheme": "int4-weight-only", "sparsity": "2:4"}, "scheme must be None or one of 'int8', 'fp8'"),
        ({"max_seqlen": 1}, "max_seqlen must be a positive number, of tokens at least 2, got 1"),
        ({"jobs": 1.5}, "jobs must be a positive number"),
        ({"target": "sm_91"}, "target must be one of sm_75, .*, got 'sm_91'"),
        ({"text": "[]"}, "model must be a config with a model_type"),
        ({"text": '{"model_type": "nonsense"}'}, "model must be one that transformers can build"),
        ({"scheme": "int3"}, "must be one of .*int3"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("fusedops.warm.interpreting", lambda: False)
    (tmp_path / "config.json").write_text(options.pop("text", json.dumps(TINY)))
    with pytest.raises(ValueError, match=f"warmup: .*{message}"):
        fusedops.warmup(**{"model": tmp_path, "target": "sm_90a"} | options)


def test_the_interpreter_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(RuntimeError, match="warmup: .* without TRITON_INTERPRET=1"):
        fusedops.warmup(tmp_path)
