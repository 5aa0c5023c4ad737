"""What a tuned configuration holds for: every field of a key counts, sizes fall into buckets, neighbours are near."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops._core import env, tuning
from fusedops._core.device import INTERPRETER, TARGETS
from fusedops._core.explain import operator_call
from fusedops._core.tuning import key as keys
from fusedops._core.tuning import store
from fusedops._core.tuning.entry import Entry
from tests.core.tuning_problems import ASKED, TOY, Tile, entry_of, tile_fits

SIZES = st.integers(1, 2**40)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDOPS_CACHE_PATH", raising=False)
    store.forget_memory()
    env.refresh()
    store.counts.clear()
    yield
    store.forget_memory()
    env.refresh()


@given(size=SIZES, other=SIZES)
def test_buckets(size, other):
    bucket = keys.bucket(size)
    assert size <= bucket < size * 1.25 and keys.bucket(bucket) == bucket
    assert (bucket <= keys.bucket(other)) == (size <= other) or bucket == keys.bucket(other)


def test_the_sizes_of_models_stay():
    for size in (1, 3, 7, 64, 128, 896, 1536, 2048, 4096, 5120, 7168, 8192, 14336, 28672, 128 * 1024):
        assert keys.bucket(size) == size
    assert {keys.bucket(size) for size in range(1, 8193)} < set(range(1, 8193)) and keys.bucket(0) == 0
    assert len({keys.bucket(size) for size in range(1, 8193)}) == 8 + 4 * 10


def leaves(data, path=()):
    """Path and value of everything in a table of tables."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def changed(data, path):
    """The same with another value of the same type at one place."""
    name, *rest = path
    if rest:
        return {**data, name: changed(data[name], rest)}
    value = data[name]
    other = not value if isinstance(value, bool) else value * 8 + 8 if isinstance(value, int) else f"{value}x"
    return {**data, name: other}


def paged_choice():
    args, kwargs = fusedops._core.register.operators()["paged_attention"].example((2, 32, 4, 64), torch.float16, "cpu")
    with env.override("FUSEDOPS_BACKEND", "triton"):
        operator, args = operator_call(fusedops.paged_attention, *args, **kwargs)
        with tuning.observed() as choices:
            operator.module("triton").config("paged_attention", INTERPRETER, *args)
    return choices[0]


PAGED_FIELDS = 33


def test_every_field_of_a_key_counts():
    """An entry of a key that differs in one field alone is a miss; of the same key it is a hit."""
    choice = paged_choice()
    tunable = choice.tunable
    asked = choice.limits, choice.fields, choice.also
    config = {**tunable.values(choice.config), "num_stages": 1, "num_warps": 8}
    store.current_store().put(Entry(choice.key, config, date="2026"), keep=False)
    assert tunable.look_up(*asked).source == "memory"
    fields = list(leaves(choice.key))
    assert len(fields) == PAGED_FIELDS
    for path, _ in fields:
        store.forget_memory()
        other = changed(choice.key, path)
        store.current_store().put(Entry(other, config, date="2026"), keep=False)
        assert tunable.look_up(*asked).source == tuning.DEFAULT, path


SOURCES = {
    "arch": lambda: replace(INTERPRETER, arch="sm_100a"), "gpu": lambda: replace(INTERPRETER, name="another"),
    "sm_count": lambda: replace(INTERPRETER, sm_count=5), "l2": lambda: replace(INTERPRETER, l2=1),
    "shared_memory": lambda: replace(INTERPRETER, shared_memory=99 * 1024),
}  # fmt: skip


@pytest.mark.parametrize("field", SOURCES)
def test_another_device_is_another_key(field):
    one, other = keys.environment(INTERPRETER), keys.environment(SOURCES[field]())
    assert {name for name in one if one[name] != other[name]} == {field}


@pytest.mark.parametrize("field", ["triton", "torch", "cuda", "driver"])
def test_other_software_is_another_key(monkeypatch, field):
    before = keys.environment(INTERPRETER)
    keys._software.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9" if field == "torch" else torch.__version__)
        patch.setattr(torch.version, "cuda", "9.9" if field == "cuda" else torch.version.cuda)
        version = keys._version
        patch.setattr(keys, "_version", lambda name: "9.9" if name == field else version(name))
        driver = keys._driver
        patch.setattr(keys, "_driver", lambda: 99 if field == "driver" else driver())
        after = keys.environment(INTERPRETER)
    keys._software.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {field}


def test_other_code_is_another_key(tmp_path):
    """A changed kernel, and a changed space of what may be tuned."""
    for package in (False, True):
        keys.source_hash.cache_clear()
        path = tmp_path / ("__init__.py" if package else "_triton.py")
        path.write_text("x = 1")
        (tmp_path / "part.py").write_text("y = 1")
        before = keys.source_hash(path)
        keys.source_hash.cache_clear()
        assert keys.source_hash(path) == before
        (tmp_path / "part.py").write_text("y = 2")
        keys.source_hash.cache_clear()
        assert (keys.source_hash(path) != before) == package
        path.write_text("x = 2")
        keys.source_hash.cache_clear()
        assert keys.source_hash(path) != before
    key = TOY.key(INTERPRETER, *ASKED)
    before = TOY.space
    TOY.space = {**before, "block": (*before["block"], 512)}
    assert TOY.key(INTERPRETER, *ASKED)["space"] != key["space"]
    TOY.space = before


def near_entry(rows, width=64, block=256, num_warps=8):
    return entry_of((rows, width, False), config={"block": block, "num_warps": num_warps})


def found(rows, width=64, also=ASKED[1]):
    choice = TOY.look_up(INTERPRETER, (rows, width, False), also)
    return choice.config.block if choice.source != tuning.DEFAULT else None


@pytest.mark.parametrize("layer", ["memory", "user"])
def test_known_bug_b58_a_neighbour_is_near_in_every_size_and_equal_in_every_flag(layer):
    """apache/tvm#4404: one line more in the shipped log made shapes pick a neighbour that was 200 times slower."""
    store.current_store().put(near_entry(128), keep=layer == "user")
    if layer == "user":
        store.forget_memory()
    assert found(128) == 256 and found(120) == 256
    for rows in (64, 80, 100, 160, 256):
        assert found(rows) == 256, rows
    for rows in (1, 32, 56, 320, 512, 4096):
        assert found(rows) is None, rows
    assert found(128, width=32) == 256 and found(128, width=16) is None and found(256, width=32) == 256
    assert found(256, also=("fp16",)) is None


def test_the_nearest_neighbour_is_used_and_says_so():
    for rows, block in ((64, 32), (128, 128), (256, 256)):
        store.current_store().put(near_entry(rows, block=block, num_warps=2), keep=False)
    choice = TOY.look_up(INTERPRETER, (112, 64, False), ASKED[1])
    assert choice.config == Tile(128, 2) and choice.source == "memory, tuned for rows=128, width=64"
    assert found(200) == 256 and found(65) == 32


def test_known_bug_b58_a_neighbours_configuration_must_be_legal_here():
    """block 256 fits a width of 64 and not one of 128, where the next best neighbour is taken."""
    assert tile_fits(Tile(256, 8), 1, 64, False, INTERPRETER) and not tile_fits(Tile(256), 1, 128, False, INTERPRETER)
    store.current_store().put(near_entry(100, width=64), keep=False)
    assert found(100, width=128) is None
    store.current_store().put(near_entry(160, width=64, block=128), keep=False)
    assert found(100, width=128) == 128


@pytest.mark.parametrize("target", TARGETS)
def test_known_bug_b57_no_candidate_is_more_than_a_device_holds(target):
    """sgl-project/sglang#28038: a default wanted 147,456 bytes of shared memory, the device had 101,376."""
    limits = TARGETS[target]
    for rows in (1, 100, 5000):
        for width in (16, 64, 256):
            for config in TOY.candidates(limits, (rows, width, False))[1:]:
                assert config == Tile() or config.block * width <= limits.shared_memory // 8


def test_counters():
    def ask(rows, also=ASKED[1]):
        TOY.choose(INTERPRETER, (rows, 64, False), also)

    TOY.forget()
    store.current_store().put(near_entry(128), keep=False)
    ask(128)
    ask(128)  # not new
    ask(200)
    ask(5000)
    ask(128, ("fp16",))
    assert fusedops.tuning.counters() == {"hit": 1, "miss": 3, "invalid": 0, "default": 2, "fallback": 1}
    fusedops.tuning.reset_counters()
    assert set(fusedops.tuning.counters().values()) == {0}


def test_a_repeated_question_reads_nothing(monkeypatch):
    """The way of every launch but the first: one look into a dictionary."""
    TOY.forget()
    limits = replace(INTERPRETER)
    first = TOY.choose(limits, *ASKED)
    monkeypatch.setattr(TOY, "look_up", None)
    monkeypatch.setattr(TOY, "default", None)
    monkeypatch.setattr(store, "current_store", None)
    assert TOY.choose(limits, *ASKED) is first
    with pytest.raises(TypeError):
        TOY.choose(limits, (101, 64, False), ASKED[1])


def test_two_devices_have_answers_of_their_own():
    TOY.forget()
    store.current_store().put(entry_of(), keep=False)
    assert TOY.choose(INTERPRETER, *ASKED) == Tile(128, 8)
    assert TOY.choose(TARGETS["sm_80"], *ASKED) == Tile()
    assert TOY.choose(INTERPRETER, *ASKED) == Tile(128, 8)


def test_answers_are_bounded(monkeypatch):
    TOY.forget()
    monkeypatch.setattr(tuning, "MAX_RESOLVED", 10)
    for rows in range(1, 200):
        assert TOY.choose(INTERPRETER, (rows, 64, False), ASKED[1]) == Tile()
        assert len(TOY._resolved[id(INTERPRETER)]) <= 12


def test_defaults_only_uses_nothing_that_was_tuned():
    TOY.forget()
    store.current_store().put(entry_of(), keep=False)
    with tuning.defaults_only():
        assert TOY.choose(INTERPRETER, *ASKED) == Tile()
        with tuning.defaults_only():
            assert TOY.look_up(INTERPRETER, *ASKED).source == tuning.DEFAULT
        assert TOY.choose(INTERPRETER, *ASKED) == Tile()
    assert TOY.choose(INTERPRETER, *ASKED) == Tile(128, 8) and not tuning.uses_defaults_only()
