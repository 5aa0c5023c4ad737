"""Continuous batching and the patch itself: what is set, what is undone, copies, kept managers, other releases."""

import copy
import pickle
import sys

import pytest
import torch

from fusedops.patch import continuous, patch, unpatch
from fusedops.patch.attention import NAME
from tests.patch.engine import alone, greedy, prompts, quick_collections, settings, together  # noqa: F401 - a fixture
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import tiny

transformers = pytest.importorskip("transformers")
if continuous.unsupported():
    pytest.skip(continuous.unsupported(), allow_module_level=True)
KEPT = "_cached_continuous_batching_manager"


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_nothing_is_left(before):
    """The model, its config, transformers' registries and its flash imports are the same objects as ever."""
    from transformers import modeling_flash_attention_utils as flash

    model, inputs = tiny("llama"), prompts((3, 30))
    model.set_attn_implementation(before)
    expected, found, imports = together(model, inputs), snapshot(model), dict(vars(flash))
    assert model.config._attn_implementation == before
    handle = patch(model)
    assert together(model, inputs) == expected
    assert model.config._attn_implementation == NAME and "fusedops_flash2" not in str(vars(model.config))
    assert_same(imports, dict(vars(flash)))
    handle.undo()
    assert_same(found, snapshot(model))
    assert together(model, inputs) == expected


def test_manager_as_the_engine_makes_it():
    """No masks are built or planned for, and the manager's model is the model in all but its config."""
    model = tiny("gemma2")
    with patch(model):
        manager = model.init_continuous_batching(greedy(), settings())
        processor = manager._create_batch_processor()
        assert processor.inputs_and_outputs.attention_mask is None
        assert manager.model.dtype is model.dtype and manager.model.config.hidden_size == model.config.hidden_size
        assert model.config._attn_implementation == NAME
        with pytest.raises(AttributeError, match="no_such_attribute"):
            manager.model.no_such_attribute  # noqa: B018
        manager.destroy()


def test_fast_decoding_on_a_gpu(monkeypatch):
    """There the engine looks for a flash package's function before it fills block tables."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, loaded = tiny("llama"), flash._loaded_implementation
    with patch(model):
        given = settings(max_blocks_per_request=12)
        with continuous._flash_importable():
            initialization.ensure_decode_fast_path_is_available(continuous.EngineModel(model).config, given, True)
            assert given.max_blocks_per_request == 12
        assert flash._loaded_implementation is loaded and flash._lazy_imports.__module__ == flash.__name__


def test_copies():
    """deepcopy and pickle give models with an engine of their own; each is undone by itself."""
    model, inputs = tiny("llama"), prompts((3, 9))
    expected = alone(model, inputs, 4)
    handle = patch(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.init_continuous_batching.args == (again,)
        assert together(again, inputs, 4) == expected
        unpatch(again)
        assert "init_continuous_batching" not in vars(again) and again.config._attn_implementation == "eager"
        assert together(again, inputs, 4) == expected
    assert together(model, inputs, 4) == expected
    handle.undo()


def keep(model, inputs):
    outputs = model.generate_batch(inputs, greedy(6), settings(), persistent_manager=True)
    return [output.generated_tokens for output in outputs.values()]


def test_manager_kept_for_the_next_session():
    """Ours goes with the patch; one from before serves patched and unpatched."""
    model, inputs = tiny("gemma2"), prompts((3, 30, 9))
    expected = alone(model, inputs, 6)
    handle = patch(model)
    assert keep(model, inputs) == expected and keep(model, inputs[::-1]) == expected[::-1]
    handle.undo()
    assert KEPT not in vars(model)
    model = tiny("llama")  # the engine's own eager attention ignores the soft caps of the other
    model.set_attn_implementation("sdpa")
    expected = alone(model, inputs, 6)
    assert keep(model, inputs) == expected
    kept = vars(model)[KEPT]
    handle = patch(model)
    assert keep(model, inputs) == expected and vars(model)[KEPT] is kept
    handle.undo()
    assert keep(model, inputs) == expected and vars(model)[KEPT] is kept
    model.destroy_cached_continuous_batching_manager()


def test_foreign_method():
    """Who replaces the method after us must be undone first."""
    model = tiny("llama")
    handle = patch(model)
    ours, model.init_continuous_batching = model.init_continuous_batching, None
    model.init_continuous_batching = lambda *args: None
    with pytest.raises(RuntimeError, match="undo: init_continuous_batching of a LlamaForCausalLM was replaced"):
        handle.undo()
    model.init_continuous_batching = ours
    handle.undo()
    assert "init_continuous_batching" not in vars(model)


def test_other_releases(monkeypatch):
    """Every release changed the engine: another one than we know is refused by name, not tried."""
    model = tiny("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.24.0")  # loading a model exchanges the module
    handle = patch(model)
    assert handle.report.engine == f"not available: {continuous.unsupported()}"
    with pytest.raises(NotImplementedError, match=r"5\.23 alone, got transformers 5\.24\.0; undo\(\) first"):
        model.generate_batch([[3, 4]], greedy(), settings())
    handle.undo()
    assert len(together(model, [[3, 4]])[0]) == 10


def test_parts_that_are_gone(monkeypatch):
    from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

    monkeypatch.delattr(FullAttentionCacheAllocator, "get_cache_for_block_table")
    monkeypatch.setattr(FullAttentionCacheAllocator, "__abstractmethods__", frozenset())
    monkeypatch.delattr(FullAttentionCacheAllocator.__mro__[1], "get_cache_for_block_table")
    assert continuous.unsupported().endswith("lacks get_cache_for_block_table")


def test_attention_that_was_dropped():
    """As verification does where it does not agree: the engine is the model's own again."""
    model, inputs = tiny("llama"), prompts((3, 9))
    expected = together(model, inputs, 4)
    handle = patch(model)
    handle.drop({(row.path, row.kind): "a reason" for row in handle.report.replaced if row.kind == "attention"})
    assert handle.report.engine == "" and model.config._attn_implementation == "eager"
    assert together(model, inputs, 4) == expected
    handle.undo()
    assert "init_continuous_batching" not in vars(model)


def test_only_with_attention():
    """Without our attention, and without a model that generates, there is nothing to do."""
    model, inputs = tiny("llama"), prompts((3, 9))
    with patch(model, attention=False) as handle:
        assert handle.report.engine == "" and "init_continuous_batching" not in vars(model)
        assert together(model, inputs, 4) == alone(model, inputs, 4)
    with patch(model.model) as handle:
        assert handle.report.engine == ""
    assert patch(model, dry_run=True).report.engine and "init_continuous_batching" not in vars(model)
