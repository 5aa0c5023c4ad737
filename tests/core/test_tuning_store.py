"""Where tuned configurations are kept: nothing is lost, nothing is read half, nothing raises."""

import errno
import multiprocessing
import os
import random
import signal
import stat
import time
import warnings

import pytest

from fusedops._core import env, tuning
from fusedops._core.tuning import folder, store
from fusedops._core.tuning.entry import InvalidEntry, decode, encode
from tests.core.tuning_problems import ASKED, INTERPRETER, TOY, Tile, damaged, entry_of

FOUND = Tile(128, 8)  # what `entry_of` holds
BREAKING = [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EBUSY, errno.ESTALE, errno.ENOENT, errno.EIO, errno.EDQUOT]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A user's folder of one test."""
    place = tmp_path / "cache"
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(place))
    monkeypatch.delenv("FUSEDOPS_CACHE_PATH", raising=False)
    start_again()
    yield place
    store.forget_memory()


def start_again():
    """As a new process would."""
    store.forget_memory()
    store.counts.clear()
    env.refresh()


def chosen(asked=ASKED):
    """(configuration, where it came from), without a memory of earlier questions."""
    choice = TOY.look_up(INTERPRETER, *asked)
    return choice.config, choice.source


def file_of(cache, entry):
    return cache.joinpath("tuning", *entry.folder, entry.name)


def put_quietly(entry):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.current_store().put(entry)


def test_what_is_put_is_found_by_the_next_process(cache):
    entry = entry_of()
    put_quietly(entry)
    assert chosen() == (FOUND, "memory")
    start_again()
    assert chosen() == (FOUND, "user")
    assert decode(file_of(cache, entry).read_bytes()) == entry
    for path in (cache / "tuning").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_nothing_is_the_default():
    assert chosen() == (Tile(), tuning.DEFAULT)


def test_the_layers_are_asked_in_their_order(cache, monkeypatch, tmp_path):
    configs = [{"block": block, "num_warps": 2} for block in (32, 64, 128, 256)]
    sites = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "wheel")
    shipped = store.Layer("user", tmp_path, ("wheel",), True)
    assert shipped.put(entry_of(config=configs[0]))
    monkeypatch.setenv("FUSEDOPS_CACHE_PATH", os.pathsep.join(map(str, sites)))
    expected = [("wheel", 32)]
    for site, config, name in zip((sites[1], sites[0]), configs[1:], ("site", "site")):
        assert store.Layer("user", site, ("tuning",), True).put(entry_of(config=config))
        expected.append((name, config["block"]))
    start_again()
    assert chosen() == (Tile(128, 2), "site")
    put_quietly(entry_of(config=configs[3]))
    start_again()
    assert chosen() == (Tile(256, 2), "user")
    store.current_store().put(entry_of(), keep=False)
    assert chosen() == (FOUND, "memory")
    start_again()
    for gone, (name, block) in zip((cache, sites[0], sites[1]), reversed(expected)):
        for path in gone.rglob("*.json"):
            path.unlink()
        start_again()
        assert chosen() == (Tile(block, 2), name)


def test_a_folder_with_more_files_than_are_read_at_once_loses_none(monkeypatch):
    names = [str(number) for number in range(8)]
    for name in names:
        put_quietly(entry_of(also=(name,)))
    monkeypatch.setattr(store, "MAX_SCANNED", 3)
    start_again()
    assert all(chosen((ASKED[0], (name,))) == (FOUND, "user") for name in names)
    assert len(store.current_store().user.entries()) == len(names)


def test_the_disk_is_read_once(monkeypatch):
    """New shapes of a known kernel cost no file."""
    put_quietly(entry_of())
    start_again()
    assert chosen()[1] == "user"
    monkeypatch.setattr(folder.os, "open", None)
    assert chosen()[1] == "user"
    assert chosen(((5000, 64, False), ("bf16",)))[1] == chosen((ASKED[0], ("other",)))[1] == tuning.DEFAULT


def test_a_site_is_never_written(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPS_CACHE_PATH", str(tmp_path / "site"))
    site = file_of(tmp_path / "site", entry_of())
    site.parent.mkdir(parents=True)
    site.write_bytes(b"{}")
    start_again()
    with pytest.warns(store.TuningWarning, match="has other fields"):
        assert chosen() == (Tile(), tuning.DEFAULT)
    assert site.read_bytes() == b"{}" and len(list(site.parent.iterdir())) == 1


def check_damaged(cache, seeds):
    """Each damaged file is a miss, a warning and moved aside; the next entry can be put in its place."""
    entry = entry_of()
    path = file_of(cache, entry)
    put_quietly(entry)
    for seed in seeds:
        content = damaged(entry, seed)
        with pytest.raises(InvalidEntry):
            decode(content)
        start_again()
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert chosen() == (Tile(), tuning.DEFAULT), seed
            assert chosen() == (Tile(), tuning.DEFAULT), seed
        assert len(told) == 1 and "moved aside" in str(told[0].message), seed
        assert store.counts["invalid"] == 1 and not path.exists() and path.with_name(path.name + ".bad").exists()
    put_quietly(entry)
    start_again()
    assert chosen() == (FOUND, "user")


def test_damaged_files(cache):
    check_damaged(cache, range(150))


@pytest.mark.deep
def test_a_thousand_damaged_files(cache):
    check_damaged(cache, range(1000))


def test_an_entry_under_another_keys_name_is_refused(cache):
    entry, other = entry_of(), entry_of(also=("fp16",))
    put_quietly(entry)
    file_of(cache, entry).rename(file_of(cache, other))
    start_again()
    with pytest.warns(store.TuningWarning, match="stands under another key's name"):
        assert chosen((ASKED[0], ("fp16",))) == (Tile(), tuning.DEFAULT)


@pytest.mark.parametrize(
    "config",
    [{"block": 512, "num_warps": 8}, {"block": 96, "num_warps": 4}, {"block": 128}, {"block": True, "num_warps": 4},
     {"block": 128, "num_warps": 8, "more": 1}, {"block": "128", "num_warps": 8}, {"block": 32, "num_warps": 8}],
)  # fmt: skip
def test_a_configuration_that_is_not_legal_there_is_not_used(config):
    put_quietly(entry_of(config=config))
    start_again()
    assert chosen() == (Tile(), tuning.DEFAULT)
    assert store.counts["invalid"]


def test_a_file_that_another_replaced_meanwhile_is_not_moved_aside(cache, monkeypatch):
    entry = entry_of()
    path = file_of(cache, entry)
    put_quietly(entry)
    path.write_bytes(b"half")
    read = folder.read_file

    def raced(*args):
        found = read(*args)
        put_quietly(entry)
        return found

    monkeypatch.setattr(folder, "read_file", raced)
    descriptor = os.open(path.parent, os.O_RDONLY)
    with pytest.warns(store.TuningWarning, match="is no JSON"):
        assert store.current_store().user._read(descriptor, entry.folder, entry.name) is None
    os.close(descriptor)
    monkeypatch.undo()
    assert decode(path.read_bytes()) == entry


def in_processes(number, work):
    """Run work(index) in so many processes at once; each must end well."""
    context = multiprocessing.get_context("fork")  # each with torch loaded already
    started = [context.Process(target=work, args=(index,)) for index in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * number


def check_many_writers(writers, puts):
    """Every writer's own entries are there, and the one that all write is whole whenever it is read."""
    shared = entry_of(also=("shared",))

    def work(index):
        for number in range(puts):
            put_quietly(entry_of(also=(f"{index} {number}",)))
            put_quietly(entry_of(also=("shared",), host=f"{index} {number} " + "x" * random.randrange(4000)))
            assert store.current_store().user.get(shared.folder, shared.name) is not None

    in_processes(writers, work)
    start_again()
    found = {entry.key["flags"]["dtype"] for entry in store.current_store().user.entries()}
    wanted = {f"{index} {number}" for index in range(writers) for number in range(puts)}
    if len(wanted) < store.MAX_SCANNED:
        assert found == {*wanted, "shared"}
    else:
        user = store.current_store().user
        assert all(user.get(one.folder, one.name) for one in (entry_of(also=(name,)) for name in wanted))
    assert not store.counts["invalid"]


def test_many_writers_lose_nothing():
    check_many_writers(6, 20)


@pytest.mark.deep
def test_64_writers_lose_nothing_of_200_each():
    check_many_writers(64, 200)


def check_kills(cache, kills):
    """What a writer said it had put is there whenever it is killed, and nothing is ever half there."""
    said = set()
    for turn in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for number in range(10_000):
                if store.current_store().put(entry_of(also=(f"{turn} {number}",))):
                    os.write(writing, f"{turn} {number}\n".encode())
            os._exit(0)
        os.close(writing)
        begun = os.read(reading, 1)  # the first is there
        time.sleep(random.Random(turn).random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            said.update((begun + pipe.read()).decode().split("\n")[:-1])
    assert len(said) >= kills
    start_again()
    user = store.current_store().user
    assert all(user.get(one.folder, one.name) == one for one in (entry_of(also=(name,)) for name in said))
    assert not store.counts["invalid"]
    leftovers = list(cache.rglob("*.tmp"))
    assert all(path.name.startswith(".") for path in leftovers)


def test_a_writer_that_is_killed_leaves_nothing_half(cache):
    check_kills(cache, 12)


@pytest.mark.deep
def test_100_writers_that_are_killed_leave_nothing_half(cache):
    check_kills(cache, 100)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "mkdir", "makedirs"])
@pytest.mark.parametrize("number", BREAKING, ids=errno.errorcode.get)
def test_a_disk_that_fails_while_writing_costs_one_warning(cache, monkeypatch, call, number):
    real = getattr(os, call)

    def failing(*args, **kwargs):
        if call != "open" or (isinstance(args[0], str) and args[0].endswith(folder.TEMPORARY)):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    entry = entry_of()
    store.current_store()
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(folder.os, call, failing)
        assert not store.current_store().put(entry)
        assert not store.current_store().put(entry)
        assert chosen() == (FOUND, "memory")
    assert len(told) == 1 and os.strerror(number) in str(told[0].message)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert store.current_store().put(entry)
    start_again()
    assert chosen() == (FOUND, "user")


@pytest.mark.parametrize("call", ["open", "read", "fstat"])
@pytest.mark.parametrize("number", BREAKING, ids=errno.errorcode.get)
def test_a_disk_that_fails_while_reading_is_a_miss(monkeypatch, call, number):
    put_quietly(entry_of())
    start_again()

    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(folder.os, call, failing)
        assert chosen() == (Tile(), tuning.DEFAULT)
    assert len({str(one.message) for one in told}) == len(told) <= len(store.current_store().layers)
    start_again()
    assert chosen() == (FOUND, "user")


def test_a_folder_that_is_cleared_meanwhile_is_made_again(cache, monkeypatch):
    entry, write = entry_of(), folder.write_file

    def cleared_once(descriptor, name, content):
        monkeypatch.setattr(folder, "write_file", write)
        file_of(cache, entry).parent.rmdir()
        write(descriptor, name, content)

    monkeypatch.setattr(folder, "write_file", cleared_once)
    put_quietly(entry)
    start_again()
    assert chosen() == (FOUND, "user")


def assert_memory_only(match):
    """Puts stay in memory, with one warning, and nothing of the folder is read."""
    with pytest.warns(store.TuningWarning, match=match) as told:
        assert chosen()[1] == tuning.DEFAULT
        assert not store.current_store().put(entry_of())
        assert chosen() == (FOUND, "memory")
    assert len(told) == 1


@pytest.mark.parametrize("below", [(), ("tuning",), ("tuning", "v1")])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_is_refused(cache, below, mode):
    put_quietly(entry_of())
    cache.joinpath(*below).chmod(mode)
    start_again()
    assert_memory_only("can be written by others")


def test_a_file_that_others_may_write_is_refused(cache):
    put_quietly(entry_of())
    file_of(cache, entry_of()).chmod(0o666)
    start_again()
    with pytest.warns(store.TuningWarning, match="can be written by others"):
        assert chosen()[1] == tuning.DEFAULT


def test_another_users_folder_is_refused(monkeypatch):
    put_quietly(entry_of())
    start_again()
    owner = os.getuid()
    monkeypatch.setattr(store.os, "getuid", lambda: owner + 1)
    assert_memory_only(f"belongs to user {owner}")


def test_a_site_may_belong_to_the_administrator_and_to_nobody_else(cache, monkeypatch, tmp_path):
    put_quietly(entry_of())
    monkeypatch.setenv("FUSEDOPS_CACHE_PATH", str(cache))
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "mine"))
    start_again()
    real, owner = os.fstat, 0

    def of_somebody(descriptor):
        found = list(real(descriptor))
        found[4] = owner
        return os.stat_result(found)

    monkeypatch.setattr(folder.os, "fstat", of_somebody)
    monkeypatch.setattr(store.os, "getuid", lambda: 4321)
    assert chosen() == (FOUND, "site")
    owner = 1234
    start_again()
    with pytest.warns(store.TuningWarning, match="belongs to user 1234"):
        assert chosen()[1] == tuning.DEFAULT


@pytest.mark.parametrize("below", [("tuning",), ("tuning", "v1")])
def test_a_link_among_the_folders_is_refused(cache, tmp_path, below):
    put_quietly(entry_of())
    place = cache.joinpath(*below)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    start_again()
    assert_memory_only("is a link")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_not_read(cache, tmp_path, kind):
    entry = entry_of()
    put_quietly(entry)
    path = file_of(cache, entry)
    path.rename(tmp_path / "real")
    {"link": lambda: path.symlink_to(tmp_path / "real"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    start_again()
    with pytest.warns(store.TuningWarning) as told:
        assert chosen() == (Tile(), tuning.DEFAULT)
    assert len(told) == 1


def test_a_link_to_the_users_own_folder_is_the_users_choice(cache, tmp_path):
    (tmp_path / "big disk").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "big disk")
    put_quietly(entry_of())
    start_again()
    assert chosen() == (FOUND, "user")


@pytest.mark.parametrize("home", ["nowhere", "a file", "nobody", "unset"])
def test_without_a_home_everything_stays_in_memory(monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FUSEDOPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", {"a file": str(tmp_path / "file")}.get(home, "/proc/nowhere"))
    if home == "nobody":
        monkeypatch.setenv("FUSEDOPS_CACHE_DIR", "~nobody-of-this-name/cache")
    if home == "unset":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without an entry
    start_again()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not store.current_store().put(entry_of())
    assert chosen() == (FOUND, "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_an_entry_that_is_too_large_is_not_made():
    with pytest.raises(InvalidEntry, match="at most 65536 are allowed"):
        encode(entry_of(host="x" * 65536))
