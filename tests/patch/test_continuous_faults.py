"""Continuous batching that goes wrong: every other request finishes with its tokens, and every page comes back."""

import pytest
import torch

from fusedops.patch import continuous, patch
from tests.patch.engine import (  # noqa: F401 - a fixture
    alone,
    assert_all_free,
    finished,
    greedy,
    in_batch,
    prompts,
    quick_collections,
    running,
    settings,
    together,
)
from tests.patch.tiny_models import tiny

transformers = pytest.importorskip("transformers")
if continuous.unsupported():
    pytest.skip(continuous.unsupported(), allow_module_level=True)


@pytest.mark.parametrize(("family", "blocks"), [("llama", 0), ("llama", 16), ("gemma2", 0)])
def test_exhausted_pool(family, blocks):
    """Requests that get no page are put off, newest first: all their pages come back, and they start again later."""
    model, inputs = tiny(family), prompts((30, 28, 26, 24, 22, 20))
    expected = alone(model, inputs, 16)
    patch(model)
    put_off = []

    def watch(processor):
        offload = processor.offloading_manager.offload_requests
        processor.offloading_manager.offload_requests = lambda: put_off.append(1) or offload()

    options = {"new_tokens": 16, "num_blocks": 12, "blocks": blocks, "scheduler_type": "prefill_first"}
    assert in_batch(model, inputs, watch, **options) == expected
    assert put_off


def test_request_that_no_pool_holds():
    """The engine gives up as a whole: whoever was still there fails, with the reason; the model is unharmed."""
    model, inputs = tiny("llama"), prompts((60, 5))
    expected = alone(model, inputs)
    patch(model)
    with running(model, num_blocks=4) as manager:
        cache = manager.batch_processor.cache
        outputs = finished(manager, manager.add_requests(inputs, max_new_tokens=10))
        assert "No requests can be scheduled" in str(manager.background_thread_status.fatal_error)
    assert any("No requests can be scheduled" in (output.error or "") for output in outputs.values())
    assert_all_free(cache)
    assert in_batch(model, inputs) == expected


@pytest.mark.parametrize(("family", "blocks"), [("llama", 0), ("llama", 16), ("gpt_oss", 0)])
def test_cancelled_request(family, blocks):
    """In the middle of a batch, after some of its tokens were delivered."""
    model, inputs = tiny(family), prompts()
    expected = alone(model, inputs, 24)
    patch(model)
    with running(model, new_tokens=24, blocks=blocks) as manager:
        cache = manager.batch_processor.cache
        victim = manager.add_request(prompts((20,), seed=50)[0], max_new_tokens=200, streaming=True, eos_token_id=-1)
        ids = manager.add_requests(inputs, max_new_tokens=24)
        delivered = 0
        while delivered < 5:
            output = manager.get_result(timeout=60)
            assert output is not None and output.request_id == victim
            delivered = len(output.generated_tokens)
        manager.cancel_request(victim)
        rest = finished(manager, ids)
    assert victim not in rest or not rest[victim].is_finished()
    assert [rest[name].generated_tokens for name in ids] == expected
    assert_all_free(cache)


def test_request_that_the_engine_refuses():
    """Its error is its own."""
    model, inputs = tiny("llama"), prompts((3, 30))
    expected = alone(model, inputs)
    patch(model)
    with running(model, per_request_processors=True, drop_unsupported_processors=False) as manager:
        cache = manager.batch_processor.cache
        bad = manager.add_request([5, 6, 7], max_new_tokens=4, no_such_option=1)
        ids = manager.add_requests(inputs, max_new_tokens=10)
        outputs = finished(manager, [bad, *ids])
    assert outputs[bad].error and not outputs[bad].generated_tokens
    assert [outputs[name].generated_tokens for name in ids] == expected
    assert_all_free(cache)


@pytest.mark.parametrize(("family", "blocks"), [("llama", 0), ("llama", 16), ("gemma2", 0)])
def test_exception_in_the_model(family, blocks):
    """The engine fails every request with what it has generated so far, and its thread ends. All pages come back."""
    model, inputs = tiny(family), prompts()
    expected = alone(model, inputs)
    patch(model)
    calls = []

    def fail_in_the_middle(module, args):
        calls.append(module)
        if len(calls) == 6:
            raise ZeroDivisionError("planted")

    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail_in_the_middle)
    with running(model, blocks=blocks) as manager:
        cache = manager.batch_processor.cache
        ids = manager.add_requests(inputs, max_new_tokens=10)
        outputs = finished(manager, ids)
        assert isinstance(manager.background_thread_status.fatal_error, ZeroDivisionError)
    assert {output.error for output in outputs.values()} == {"planted"}
    partial = [outputs[name].generated_tokens for name in ids]
    assert any(partial) and partial == [tokens[: len(part)] for tokens, part in zip(expected, partial, strict=True)]
    assert_all_free(cache)
    hook.remove()
    assert in_batch(model, inputs, blocks=blocks) == expected
    assert alone(model, inputs) == expected


def test_generate_batch_returns_what_failed():
    model, inputs = tiny("llama"), prompts((3, 9))
    expected = alone(model, inputs)
    handle = patch(model)
    hook = model.model.norm.register_forward_pre_hook(lambda *args: 1 / 0)
    outputs = model.generate_batch(inputs, greedy(), settings())
    assert [output.error for output in outputs.values()] == ["division by zero"] * 2
    hook.remove()
    assert together(model, inputs) == expected
    handle.undo()
    assert alone(model, inputs) == expected


def test_undo_in_the_middle():
    """Refused while the engine runs, and harmless: the batch goes on."""
    model, inputs = tiny("llama"), prompts((3, 9))
    expected = alone(model, inputs)
    handle = patch(model)
    with running(model) as manager:
        with pytest.raises(RuntimeError, match="undo: continuous batching of a LlamaForCausalLM is running; stop()"):
            handle.undo()
        ids = manager.add_requests(inputs, max_new_tokens=10)
        outputs = finished(manager, ids)
    assert [outputs[name].generated_tokens for name in ids] == expected
    handle.undo()
    assert together(model, inputs) == expected


@pytest.mark.parametrize("how", ["undo", "sdpa"])
def test_manager_that_outlives_its_attention(how):
    """It has built no masks, so nothing may be computed with another attention."""
    model, inputs = tiny("llama"), prompts((3, 9))
    handle = patch(model)
    manager = model.init_continuous_batching(greedy(), settings())
    if how == "undo":
        handle.undo()
    else:
        model.set_attn_implementation(how)
    manager.start()
    outputs = finished(manager, manager.add_requests(inputs, max_new_tokens=10))
    manager.stop()
    assert all("make another manager" in output.error for output in outputs.values())
    if how == "sdpa":  # the model's own engine again
        assert together(model, inputs) == alone(model, inputs)
        handle.undo()


def test_another_thread_generates_meanwhile():
    """Nothing that `generate` looks at changes while the engine is made or runs."""
    model, inputs = tiny("llama"), prompts((30, 9, 17))
    expected = alone(model, inputs)
    patch(model)
    with running(model, new_tokens=40) as manager:
        ids = manager.add_requests(inputs, max_new_tokens=40)
        assert alone(model, inputs) == expected
        assert torch.equal(model(torch.tensor(inputs[:1])).logits, model(torch.tensor(inputs[:1])).logits)
        outputs = finished(manager, ids)
    assert [outputs[name].generated_tokens[:10] for name in ids] == expected
