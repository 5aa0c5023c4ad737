"""Serve requests in several ways, in this process, and note when each token came and what the KV cache held."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fusedops._core import dispatch
from fusedops.cli import measure
from fusedops.cli.console import CommandError, first_line

COMPILE = {}  # other than what transformers gives torch.compile
NO_END = -1  # no token ends an answer: every request gets exactly as many tokens as it wants


@dataclass(frozen=True)
class Settings:
    """What an engine is given.

    Attributes:
        page_size: Tokens on a page.
        batch_tokens: The most tokens that one step of continuous batching computes.
        pad_token: Fills the places before a prompt in a padded batch.
        longest: Tokens of the longest request of all rounds, which a static cache has room for.
    """

    page_size: int
    batch_tokens: int
    pad_token: int
    longest: int = 1


@dataclass(frozen=True)
class Served:
    """The tokens of one request, and when each reached the host, in seconds after the first request arrived."""

    tokens: tuple[int, ...]
    times: tuple[float, ...]


@dataclass(frozen=True)
class KvSample:
    """One step: bytes that the cache held, and those of them that are tokens of requests still being answered."""

    held: int
    used: int


@dataclass
class Run:
    """One way's run over all requests.

    Attributes:
        served: In the order of the requests.
        kv: One sample a step; empty where the cache does not tell.
        pool_bytes: What was set aside for the cache beforehand; None where it grows.
        peak_bytes: Peak memory; see `fusedops.cli.measure.PeakMemory`.
        calls: Operator, implementation and number of calls of ours.
        left: Operator or module, reason and number of calls that did not reach ours or its fused implementation.
    """

    served: list[Served]
    kv: list[KvSample]
    pool_bytes: int | None = None
    peak_bytes: int = 0
    calls: Sequence = ()
    left: Sequence = ()


@dataclass(frozen=True)
class Way:
    """A way to serve: `serve(model, requests, settings)` returns a `Run`; `patched` models are ours.

    `quantized` ones compute with quantised weights, too, whose tokens need not be the others'.
    """

    label: str
    patched: bool
    serve: Callable
    quantized: bool = False


def generation_config(settings, new_tokens, **more):
    """Greedy, to a fixed length, with nothing of the model's own that changes logits."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        eos_token_id=NO_END, pad_token_id=settings.pad_token, use_cache=True, **more,
    )  # fmt: skip


class Clock:
    """Seconds since the first request arrived."""

    def __init__(self):
        self._start = time.perf_counter()

    def now(self):
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def of(self, moment):
        """A `time.perf_counter` reading as seconds since the start."""
        return moment - self._start

    def wait_until(self, moment):
        """Sleep where `moment` is still to come."""
        time.sleep(max(0.0, moment - self.now()))


class BatchStreamer:
    """A streamer for ``generate`` that notes when each step's tokens, one a row, reach the host."""

    def __init__(self, clock):
        self._clock = clock
        self._prompt_seen = False
        self.times = []
        self.steps = []

    def put(self, value):
        """Take the prompts first, then one token of every row at a time."""
        if self._prompt_seen:
            self.times.append(self._clock.now())
            self.steps.append(value.tolist())
        self._prompt_seen = True

    def end(self):
        """Called once after the last token."""


def one_by_one(model, requests, settings):
    """``generate`` for one request at a time, in the order of arrival."""
    return _in_batches(model, requests, settings, lambda waiting, now: 1)


def compiled(model, requests, settings):
    """As `one_by_one`, each step of decoding by torch.compile, with keys and values in tensors as long as the longest.

    The cache is made once, so that nothing is compiled for a second length.
    """
    from transformers import CompileConfig, StaticCache

    compiling = CompileConfig(**COMPILE)
    compiling._compile_all_devices = True  # transformers leaves CPUs out
    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    cache = StaticCache(config=model.config, max_cache_len=max(longest, settings.longest))
    clock, served, kv = Clock(), [], []
    for request in requests:
        clock.wait_until(request.arrival)
        cache.reset()
        more = {"compile_config": compiling}
        served += _generate(model, [request], settings, clock, None, config=more, past_key_values=cache)
        kv += [_tensors_sample(cache, [len(request.prompt) + step]) for step in range(request.new_tokens)]
    return Run(served, kv)


def padded(model, requests, settings):
    """``generate`` for all requests that have arrived, padded on the left to the longest, until its last one ends."""
    return _in_batches(model, requests, settings, _arrived)


def padded_in_pages(model, requests, settings):
    """As `padded`, with `fusedops.patch.PagedCache` in place of tensors as long as the longest row."""
    from fusedops.patch import PagedCache

    caches = []

    def make_cache(batch):
        most = max(request.new_tokens for request in batch)
        pages = sum(-(-(len(request.prompt) + most) // settings.page_size) for request in batch)
        caches.append(PagedCache(model, num_pages=pages, page_size=settings.page_size))
        return caches[-1]

    run = _in_batches(model, requests, settings, _arrived, make_cache)
    run.pool_bytes = max(cache.pages.k.nbytes + cache.pages.v.nbytes for cache in caches)
    return run


def _arrived(waiting, now):
    return max(1, sum(request.arrival <= now for request in waiting))


def _in_batches(model, requests, settings, how_many, make_cache=None):
    """Serve the requests batch by batch; `how_many` of those that wait make the next one, in a cache of its own."""
    clock, served, kv = Clock(), [], []
    while len(served) < len(requests):
        waiting = requests[len(served) :]
        clock.wait_until(waiting[0].arrival)
        batch = waiting[: how_many(waiting, clock.now())]
        cache = {} if make_cache is None else {"past_key_values": make_cache(batch)}
        served += _generate(model, batch, settings, clock, kv, **cache)
    return Run(served, kv)


def _generate(model, batch, settings, clock, kv, config=None, **cache):
    """Generate for one batch; a row whose request has all its tokens goes on until the last one has.

    `kv` gets a sample for each step; None watches no step, which would be in the way of a compiler.
    """
    longest = max(len(request.prompt) for request in batch)
    ids = torch.full((len(batch), longest), settings.pad_token)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, longest - len(request.prompt) :] = 1
    streamer = BatchStreamer(clock)
    steps = []
    most = max(request.new_tokens for request in batch)
    with contextlib.ExitStack() as stack:
        if kv is not None:
            watch = model.register_forward_hook(
                lambda module, args, out: steps.append(_batch_sample(out, batch, len(steps)))
            )
            stack.callback(watch.remove)
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=generation_config(settings, most, **(config or {})),
            streamer=streamer,
            **cache,
        )
    if kv is not None:
        kv += [sample for sample in steps if sample is not None]
    rows = zip(*streamer.steps, strict=True)
    return [
        Served(tuple(row[: request.new_tokens]), tuple(streamer.times[: request.new_tokens]))
        for request, row in zip(batch, rows, strict=True)
    ]


def _batch_sample(output, batch, step):
    """What the cache of one ``generate`` holds after the given step, None where it is neither tensors nor pages.

    A request is still being answered in a step that computes one of its tokens.
    """
    cache = output.past_key_values
    lengths = [len(request.prompt) + step for request in batch if step < request.new_tokens]
    if hasattr(cache, "pages"):
        stats = cache.pages.stats()
        return KvSample(stats.bytes_used, sum(lengths) * stats.bytes_used // (stats.pages_used * cache.pages.page_size))
    return _tensors_sample(cache, lengths)


def _tensors_sample(cache, lengths):
    """What tensors hold of as many tokens in each row that is still being answered; None for other caches."""
    held = used = 0
    for layer in getattr(cache, "layers", ()):
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        if not all(isinstance(tensor, torch.Tensor) and tensor.dim() == 4 for tensor in tensors):
            return None
        layer_bytes = sum(tensor.nbytes for tensor in tensors)
        rows, _, places, _ = tensors[0].shape
        held += layer_bytes
        used += layer_bytes // (rows * places) * sum(min(length, places) for length in lengths)
    return KvSample(held, used) if held else None


def pages_needed(requests, page_size):
    """Pages that hold every request to its end, and a quarter more: below 15 % free, transformers takes nothing new."""
    pages = sum(-(-(len(request.prompt) + request.new_tokens) // page_size) for request in requests)
    return pages + -(-pages // 4)


def continuous(model, requests, settings):
    """transformers' continuous batching, with the attention that the model has."""
    from transformers import ContinuousBatchingConfig

    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    blocks = -(-longest // settings.page_size) + 1
    config = ContinuousBatchingConfig(
        page_size=settings.page_size,
        num_blocks=pages_needed(requests, settings.page_size),
        max_batch_tokens=settings.batch_tokens,
        max_requests_per_batch=len(requests),
        max_blocks_per_request=blocks if model.device.type == "cuda" else None,  # transformers warns where it is no use
        auto_switch_to_flash=False,
    )
    most = max(request.new_tokens for request in requests)
    manager = model.init_continuous_batching(
        generation_config=generation_config(settings, most), continuous_batching_config=config
    )
    try:
        manager.warmup()
        kv = _watch(manager.batch_processor)
        pool = manager.batch_processor.cache.cache_tensor.nbytes
        clock, results = _answer_all(manager, requests)
    finally:
        manager.stop(block=True, hard_stop=True)  # after an error nobody waits for the other answers
        manager.destroy()
    served = [
        Served(tuple(result.generated_tokens), tuple(clock.of(moment) for moment in result.timestamps))
        for result in results
    ]
    return Run(served, kv, pool)


def _answer_all(manager, requests):
    """Hand over the requests as they arrive, those of the beginning before the engine starts; wait for all answers."""

    def add(number, request):
        manager.add_request(
            list(request.prompt), request_id=str(number), max_new_tokens=request.new_tokens, eos_token_id=NO_END,
            record_timestamps=True,
        )  # fmt: skip

    at_once = sum(request.arrival == 0 for request in requests)
    for number, request in enumerate(requests[:at_once]):
        add(number, request)
    clock = Clock()
    manager.start()
    for number, request in enumerate(requests[at_once:], at_once):
        clock.wait_until(request.arrival)
        add(number, request)
    finished = {}
    while len(finished) < len(requests):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise CommandError("continuous batching stopped before all requests were answered")
        if result is not None and result.error is not None:
            raise CommandError(f"continuous batching failed: {first_line(result.error)}")
        if result is not None and result.is_finished():
            finished[int(result.request_id)] = result
    return clock, [finished[number] for number in range(len(requests))]


def _watch(processor):
    """A list that gets a sample after each forward pass of the engine, before finished requests leave it."""
    samples = []
    update = processor.update_batch

    def sample_and_update():
        samples.append(_paged_sample(processor))
        update()

    processor.update_batch = sample_and_update
    return samples


def _paged_sample(processor):
    """What the pages of requests that are being answered hold; a page that several share counts once, and is full."""
    lengths = [state.position_offset for state in processor.scheduler.active_requests.values()]
    held = used = 0
    for allocator in processor.cache.cache_allocators.values():
        per_page = allocator.tokens_per_page
        window = getattr(allocator, "sliding_window", None)
        pages = [page for of_request in allocator.block_table.values() for page in of_request]
        once = len(set(pages))
        tokens = sum(length if window is None else min(length, window) for length in lengths)
        held += once * allocator.bytes_per_block
        used += (tokens - (len(pages) - once) * per_page) * (allocator.bytes_per_block // per_page)
    return KvSample(held, used)


def timed(way, model, handle, requests, settings):
    """One run of a way, with its peak memory and the calls of our operators; `handle` is the patch's, or None."""
    dispatch.reset_counters()
    before = Counter(handle.fallbacks()) if handle else Counter()
    with measure.no_garbage_collection(), measure.PeakMemory(model.device) as peak:
        run = way.serve(model, requests, settings)
    run.peak_bytes = peak.bytes
    run.calls = [(*key, count) for key, count in sorted(dispatch.counters().items())]
    left = Counter(handle.fallbacks()) - before if handle else Counter()
    run.left = [(*key, count) for key, count in (left + Counter(dispatch.fallbacks())).items()]
    return run


WAYS = {
    "one-by-one": Way("one by one", False, one_by_one),
    "compiled": Way("compiled, static cache", False, compiled),
    "fusedops": Way("fusedops one by one", True, one_by_one),
    "fusedops-quantized": Way("fusedops", True, one_by_one, quantized=True),  # the scheme follows
    "padded": Way("padded batch", False, padded),
    "transformers-paged": Way("transformers paged", False, continuous),
    "fusedops-padded": Way("fusedops padded", True, padded),
    "fusedops-cache": Way("fusedops PagedCache", True, padded_in_pages),
    "fusedops-paged": Way("fusedops paged", True, continuous),
}
