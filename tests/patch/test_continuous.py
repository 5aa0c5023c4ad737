"""transformers' continuous batching on patched models: the tokens of one-by-one generation, whatever the batch."""

import pytest
import torch

from fusedops import counters, reset_counters
from fusedops._core import env
from fusedops.patch import continuous, continuous_attention, patch
from fusedops.patch.continuous_attention import Group, operator_page_size
from tests.patch.engine import alone, in_batch, prompts, quick_collections, together  # noqa: F401 - a fixture
from tests.patch.tiny_models import tiny

transformers = pytest.importorskip("transformers")
if continuous.unsupported():
    pytest.skip(continuous.unsupported(), allow_module_level=True)

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral", "gemma3", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_one_by_one(family):
    """Mixed lengths, long prompts in chunks beside others that decode; softcap, sinks and windows."""
    model, inputs = tiny(family), prompts()
    expected = alone(model, inputs)
    handle = patch(model)
    reset_counters()
    assert together(model, inputs) == expected
    assert handle.fallbacks() == {}
    used = {name for name, _ in counters()}
    assert "attention_varlen" in used and ("paged_attention" in used) == (family != "mistral")  # all its layers slide
    assert alone(model, inputs) == expected


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_sampling_and_several_answers(family):
    """Forks copy pages; sampled tokens of forks differ, so each is judged by the model itself."""
    model, inputs = patch(tiny(family)).model, prompts((5, 12))
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    config.eos_token_id = -1
    outputs = model.generate_batch(inputs, config, transformers.ContinuousBatchingConfig(page_size=8, num_blocks=64))
    expected = alone(model, inputs, 6)
    assert len(outputs) == 6 and [o.generated_tokens for o in outputs.values()] == [e for e in expected for _ in "123"]


@pytest.mark.parametrize(("page_size", "finer"), [(4, 1), (12, 1), (16, 16), (24, 24), (264, 88), (512, 256)])
def test_page_sizes(page_size, finer):
    """Pages that the operators do not take are seen as finer ones, in both ways of naming them."""
    assert operator_page_size(page_size) == finer
    model, inputs = tiny("llama"), prompts((3, 30, 17))
    expected = alone(model, inputs, 6)
    patch(model)
    assert in_batch(model, inputs, page_size=page_size, new_tokens=6, num_blocks=24) == expected
    assert in_batch(model, inputs, page_size=page_size, new_tokens=6, num_blocks=24, blocks=16) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_block_table(family, monkeypatch):
    """Decoding as on a GPU: pages are named by a table, written and read without a look at it on the host."""
    seen = []
    monkeypatch.setattr(continuous_attention, "Group", lambda *args: seen.append(args) or Group(*args))
    model, inputs = tiny(family), prompts()
    expected = alone(model, inputs)
    patch(model)
    assert in_batch(model, inputs, blocks=16) == expected
    tables = [given["block_table"] is not None for _, _, given in seen]
    assert sum(tables) > 5 and not all(tables)
    assert in_batch(model, inputs) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shared_prefix(family):
    """Requests that begin alike read the same pages, where no layer slides."""
    model, inputs = tiny(family), prompts((1, 5, 9, 2), prefix=24)
    expected = alone(model, inputs, 6)
    patch(model)
    shared = []

    def watch(processor):
        search = processor.cache.search_prefix_match

        def found(*args):
            shared.append(search(*args))
            return shared[-1]

        processor.cache.search_prefix_match = found

    assert in_batch(model, inputs + inputs, watch, new_tokens=6) == expected + expected
    assert (sum(shared) > 0) == (family == "llama")


def test_early_stops():
    """Requests end at their own end token, and others take their place."""
    model, inputs = tiny("llama"), prompts()
    eos = alone(model, inputs)[0][4]
    expected = alone(model, inputs, eos=eos)
    assert len({len(tokens) for tokens in expected}) > 1
    patch(model)
    assert together(model, inputs, eos=eos, max_requests_per_batch=2) == expected


def poisoned(processor):
    """Batches are padded as for CUDA graphs, and whatever was not written in the cache is NaN."""
    processor.model_runner.pad_inputs = True
    processor.cb_config.q_padding_interval_size = processor.cb_config.kv_padding_interval_size = 16
    processor.cache.cache_tensor.fill_(255)


def watch_padding(model):
    """Everything that an attention gave, in order; a hook on each output projection sees its input."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("blocks", [0, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_padding_sees_nothing(family, blocks):
    """B07 (huggingface/transformers#46765): tokens of padding write to a page that all share, and read it back."""
    assert_padding_is_isolated(family, blocks)


def assert_padding_is_isolated(family, blocks):
    model, inputs = tiny(family), prompts((3, 30, 9))
    expected = alone(model, inputs, 6)
    patch(model)
    seen = watch_padding(model)
    assert in_batch(model, inputs, poisoned, new_tokens=6, blocks=blocks) == expected
    assert all(bool(out.isfinite().all()) for out in seen)
    assert any(bool((out == 0).all(-1).any()) for out in seen), "no batch was padded"


class ReadsBack(Group):
    """B07 planted: tokens of padding count as tokens of a sequence, whose page is the shared one."""

    def __init__(self, allocator, total, given):
        super().__init__(allocator, total, given)
        if self.lengths is not None:
            self.lengths, self.table = self.lengths.clamp(min=1), self.table.clamp(min=0)
            self.slots = self.slots.clamp(min=0)
            places = given["read_index"][allocator.index]
            if places.numel():
                self.table[-1] = places[-1] // self.page_size
        self.cu_seqlens_k = self.cu_seqlens_k.clone()
        if allocator.layer_type == continuous_attention.SLIDING:
            self.cu_seqlens_k[-1] += 1


@pytest.mark.parametrize(("family", "blocks"), [("llama", 0), ("llama", 16), ("gemma2", 0)])
def test_padding_that_reads_back_is_found(family, blocks, monkeypatch):
    monkeypatch.setattr(continuous_attention, "Group", ReadsBack)
    with pytest.raises(AssertionError):
        assert_padding_is_isolated(family, blocks)


class KeptStep(continuous_attention.Step):
    """B48 planted: lengths and pages of the first forward of a kind stand for all later ones of the same shapes."""

    kept = {}

    def __init__(self):
        self.groups = Keeping(self.kept)


class Keeping(dict):
    def __init__(self, kept):
        self.kept = kept

    def __contains__(self, index):
        return False

    def __setitem__(self, index, group):
        key = index, group.cu_seqlens_q.shape, group.slots.shape, None if group.table is None else group.table.shape
        super().__setitem__(index, self.kept.setdefault(key, group))


@pytest.mark.parametrize(("family", "blocks"), [("llama", 0), ("llama", 16), ("gemma2", 0)])
def test_lengths_of_an_earlier_forward_are_found(family, blocks, monkeypatch):
    """B48 (NVIDIA/TensorRT-LLM#18443, alibaba/rtp-llm#378): a plan that outlives the batch it was made for."""
    model, inputs = tiny(family), prompts()
    expected = alone(model, inputs)
    patch(model)
    assert in_batch(model, inputs, blocks=blocks) == expected
    KeptStep.kept.clear()
    monkeypatch.setattr(continuous_attention, "Step", KeptStep)
    with pytest.raises(AssertionError):
        assert in_batch(model, inputs, blocks=blocks) == expected
    KeptStep.kept.clear()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_what_the_operators_do_not_take(family):
    """float64: torch's attention or the model's own on gathered keys, under a mask of ours, and counted."""
    model, inputs = tiny(family, torch.float64), prompts((3, 30, 9))
    expected = alone(model, inputs, 4)
    handle = patch(model, norm=False, mlp=False, rotary=False)
    assert in_batch(model, inputs, new_tokens=4) == expected
    assert len(handle.fallbacks()) == 2 and all("float64" in reason for _, reason in handle.fallbacks())
    if family == "llama":
        with pytest.raises(AssertionError, match="max_blocks_per_request=0"):
            in_batch(model, inputs, new_tokens=4, blocks=16)


@pytest.mark.parametrize(("family", "blocks"), [("llama", 16), ("gemma2", 0)])
def test_kernels(family, blocks):
    """The kernels of a GPU, interpreted."""
    model, inputs = tiny(family), prompts((3, 12))
    expected = alone(model, inputs, 3)
    patch(model, norm=False, mlp=False, rotary=False)
    reset_counters()
    with env.override("FUSEDOPS_BACKEND", "triton"):
        assert in_batch(model, inputs, new_tokens=3, blocks=blocks, page_size=16) == expected
    assert {name for name, _ in counters()} >= {"paged_attention", "write_kv_cache", "attention_varlen"}
    assert {implementation for _, implementation in counters()} == {"triton"}


def test_values_of_the_device_are_right():
    """FUSEDOPS_VALIDATE=2 looks at every length, page and slot."""
    model, inputs = tiny("gemma2"), prompts((3, 30, 9))
    expected = alone(model, inputs, 4)
    handle = patch(model)
    with env.override("FUSEDOPS_VALIDATE", "2"):
        assert in_batch(model, inputs, poisoned, new_tokens=4) == expected
    assert handle.fallbacks() == {}
