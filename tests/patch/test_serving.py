"""transformers' server on a patched model: what it loads is patched, and what it answers is the model's own text."""

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from fusedops import counters, reset_counters
from fusedops.patch import continuous, patched_modules, serving
from tests.patch.engine import alone, greedy, prompts, settings
from tests.patch.tiny_models import VOCAB, tiny

pytest.importorskip("transformers")
if continuous.unsupported():
    pytest.skip(continuous.unsupported(), allow_module_level=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a tiny model and its tokenizer of one word for each token, prompts, the tokens it says to each)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    model, inputs = tiny("llama"), prompts()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    expected = alone(model, inputs)
    assert len({text(ids) for ids in expected}) == len(inputs)
    return folder, inputs, expected


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def used():
    return {name for name, _ in counters()}


def test_what_the_server_loads_is_patched(saved):
    """The path that the server takes for each request, without HTTP; afterwards it loads plain models again."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    folder, inputs, expected = saved
    load = ModelManager._load_model
    with serving(verify=True):
        models = ModelManager(device="cpu", dtype="float32", force_model=str(folder))
    assert ModelManager._load_model is load
    name, loaded = next(iter(models.loaded_models.items()))
    assert patched_modules(loaded.model)
    state = GenerationState(continuous_batching=True, cb_config=settings())
    assert state.use_continuous_batching(loaded.model, models.get_model_modality(loaded.model, loaded.processor))
    engine = state.get_manager(name, use_cb=True)
    engine.init_cb(loaded.model, greedy())

    async def ask():
        given = [(loaded.model, loaded.processor, {"input_ids": ids}, greedy(), str(ids)) for ids in inputs]
        return await asyncio.gather(*(engine.generate_non_streaming(*arguments) for arguments in given))

    reset_counters()
    try:
        answers = asyncio.run(ask())
    finally:
        state.shutdown()
    assert [ids for _, _, ids in answers] == expected
    assert {"paged_attention", "write_kv_cache"} <= used()
    assert not patched_modules(ModelManager(device="cpu", force_model=str(folder)).loaded_models[name].model)


def test_over_http(saved):
    """``transformers serve --continuous-batching`` itself, several clients at once."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from transformers.cli.serve import Serve

    folder, inputs, expected = saved
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def post(ids):
        body = {"model": str(folder), "prompt": text(ids), "max_tokens": 10, "temperature": 0.0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]

    reset_counters()
    with serving():
        server = Serve(
            str(folder), continuous_batching=True, device="cpu", dtype="float32", port=port, cb_num_blocks=4,
            cb_max_batch_tokens=64, non_blocking=True,
        )  # fmt: skip
    try:
        wait_for(f"http://localhost:{port}/health")
        with ThreadPoolExecutor(len(inputs)) as clients:
            answers = list(clients.map(post, inputs))
    finally:
        server.kill_server()
    assert [answer.split() for answer in answers] == [text(ids).split() for ids in expected]
    assert {"paged_attention", "write_kv_cache"} <= used()


def wait_for(address):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(address)


def test_other_releases(monkeypatch):
    monkeypatch.setattr("fusedops.patch.server.unsupported", lambda: "not this one")
    with pytest.raises(NotImplementedError, match="serving: no continuous batching on patched models: not this one"):
        serving().__enter__()
