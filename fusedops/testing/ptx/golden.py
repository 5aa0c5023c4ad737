"""Golden results: what a real GPU gives for every launch of the conformance suite, compared bit by bit.

The suite is the tests of a folder: they run as always, and each launch that they make is also run on the device
(``--record``) or looked up in a file (``--check``). A launch is known by its PTX, its shape and its inputs, so a test
that launches the same under several schedules counts once, and a test that was changed is told from a difference.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusedops.testing.ptx import module as machine
from fusedops.testing.ptx.device import DeviceError

FORMAT = 1
SUITE = Path(__file__).resolve().parents[3] / "tests" / "ptx"
# Instructions that bring operands in and results out; a test is about others, where it has others.
_PLUMBING = {"ld", "st", "mov", "cvta", "ret", "exit", "bra", "add", "mul", "mad", "shl", "setp", "bar"}
_SHOWN = 4  # differing bytes of a result that a report lists


class GoldenError(RuntimeError):
    """A file that cannot be used, or a suite that cannot be run."""


@dataclass
class Launch:
    """Everything that a launch depends on; addresses are places in `buffers`."""

    text: str
    kernel: str
    grid: tuple
    block: tuple
    cluster: tuple
    shared: int
    parameters: list
    buffers: list  # (bytes, remainder of the address modulo 256)
    names: list

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.text, self.kernel, self.grid, self.block, self.cluster, self.shared, self.parameters):
            digest.update(repr(part).encode() + b"\n")
        for content, _ in self.buffers:
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()[:24]


@dataclass
class Result:
    """What a launch left in its buffers; those that it did not change are not kept."""

    test: str
    kernel: str
    instructions: list
    names: list
    outputs: dict  # index of the buffer to bytes


@dataclass
class Report:
    """What a check found."""

    same: int = 0
    differences: list = field(default_factory=list)  # (instructions, test, text)
    unknown: list = field(default_factory=list)  # tests whose launch the file does not have
    missing: list = field(default_factory=list)  # tests of the file whose launch was not made


def capture(module, kernel, grid, block, arguments, shared=0, cluster=(1, 1, 1), names=None, memory=(), **_) -> Launch:
    """A launch as `Module.launch` gets it."""
    entry = module.kernels[kernel]
    names = names or [parameter.name for parameter in entry.parameters]
    spans = [(*machine.span(one), name) for one, name in zip(arguments, names) if machine.has_memory(one)]
    for further in memory:
        name, tensor, *_ = further if isinstance(further, tuple) else ("memory", further)
        spans.append((*machine.span(tensor), name))
    ranges = _merged(spans)
    buffers = [(ctypes.string_at(begin, end - begin), begin % 256) for begin, end, _ in ranges]
    parameters = []
    for argument, parameter in zip(arguments, entry.parameters):
        if machine.has_memory(argument):
            parameters.append(("pointer", *_place(machine.span(argument)[0], ranges)))
        elif hasattr(argument, "request"):
            place = _place(argument.request.address, ranges)
            parameters.append(("map", *place, replace(argument.request, address=0)))
        else:
            parameters.append(bytes(machine.packed(argument, parameter)))
    return Launch(
        module.text, kernel, machine.three(grid), machine.three(block), machine.three(cluster), shared, parameters,
        buffers, [name for _, _, name in ranges],
    )  # fmt: skip


def _merged(spans) -> list:
    """Ranges of memory, those that overlap joined, in the order in which they are first mentioned."""
    ranges = []
    for begin, end, name in sorted(spans):
        if ranges and (begin < ranges[-1][1] or (begin, end) == ranges[-1][:2]):
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], end), ranges[-1][2])
        else:
            ranges.append((begin, end, name))

    def first_mention(one):
        return next(i for i, (begin, _, _) in enumerate(spans) if one[0] <= begin < max(one[1], one[0] + 1))

    return sorted(ranges, key=first_mention)


def _place(address, ranges) -> tuple[int, int]:
    index = next(i for i, (begin, end, _) in enumerate(ranges) if begin <= address < max(end, begin + 1))
    return index, address - ranges[index][0]


def instructions_of(text: str, kernel: str) -> list[str]:
    """The instructions of a kernel that a test of it is about, by the names of the instruction table."""
    body = re.split(rf"\.entry\s+{re.escape(kernel)}\b", text)[1].split(".entry")[0]
    known, found = machine.instructions(), set()
    for word in re.findall(r"(?:^|[;{}]|@!?%?\w+)\s*([a-z][\w.:]*)", body, re.MULTILINE):
        parts = word.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        found.update(name for name in [next((prefix for prefix in prefixes if prefix in known), None)] if name)
    return sorted(found - _PLUMBING) or sorted(found)


@contextlib.contextmanager
def every_launch(observe):
    """Calls observe(launch, run) in place of each launch; run() does it and returns the buffers afterwards."""
    original = machine.Module.launch

    def launch(self, *arguments, **options):
        steps = []

        def run():
            steps.append(original(self, *arguments, **options))
            return [content for content, _ in capture(self, *arguments, **options).buffers]

        observe(capture(self, *arguments, **options), run)
        return steps[0]

    machine.Module.launch = launch
    try:
        yield
    finally:
        machine.Module.launch = original


class Recorder:
    """Runs each launch of the suite on the device once."""

    def __init__(self, device):
        self.device, self.results, self.failed, self.test = device, {}, {}, ""

    def __call__(self, launch, run):
        key = launch.fingerprint()
        emulated = run()  # raises where the kernel is wrong on purpose: not for a device
        if key in self.results or key in self.failed:
            return
        try:
            after = emulated if self.device is None else self.device.run(
                launch.text, launch.kernel, launch.grid, launch.block, launch.cluster, launch.shared,
                launch.parameters, launch.buffers,
            )  # fmt: skip
        except DeviceError as problem:
            self.failed[key] = f"{self.test}: {problem}"
            return
        before = [content for content, _ in launch.buffers]
        outputs = {i: after[i] for i in range(len(after)) if after[i] != before[i]}
        names = instructions_of(launch.text, launch.kernel)
        self.results[key] = Result(self.test, launch.kernel, names, launch.names, outputs)


class Checker:
    """Compares each launch of the suite, in the emulator, with what a file has."""

    def __init__(self, results):
        self.results, self.report, self.seen, self.test = results, Report(), set(), ""

    def __call__(self, launch, run):
        key = launch.fingerprint()
        after = run()
        if key in self.seen:
            return
        self.seen.add(key)
        golden = self.results.get(key)
        if golden is None:
            self.report.unknown.append(self.test)
            return
        texts = [
            difference(launch.names[i], golden.outputs.get(i, before), after[i])
            for i, (before, _) in enumerate(launch.buffers)
            if golden.outputs.get(i, before) != after[i]
        ]
        if texts:
            self.report.differences.append((golden.instructions, self.test, "; ".join(texts)))
        else:
            self.report.same += 1


def difference(name, golden: bytes, emulated: bytes) -> str:
    """Where two results differ, by words of four bytes."""
    places = [at for at in range(0, len(golden), 4) if golden[at : at + 4] != emulated[at : at + 4]]
    shown = [
        f"+{at}: device 0x{golden[at : at + 4][::-1].hex()} emulator 0x{emulated[at : at + 4][::-1].hex()}"
        for at in places[:_SHOWN]
    ]
    shown += ["..."] * (len(places) > _SHOWN)
    return f"{name} differs in {len(places)} of {-(-len(golden) // 4)} words ({', '.join(shown)})"


def run_suite(suite: Path, observer) -> None:
    """Run the tests of a folder with every launch observed."""
    try:
        import pytest
    except ImportError:
        raise GoldenError("golden: the suite is run by pytest, which is not installed") from None
    if not Path(str(suite).split("::")[0]).exists():
        raise GoldenError(f"golden: no tests at {suite}; run it in a checkout of the sources, or give --suite")

    class Plugin:
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_setup(self, item):
            observer.test = item.nodeid

    with every_launch(observer):
        options = ["-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider", "--import-mode=importlib"]
        code = pytest.main([*options, str(suite)], [Plugin()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise GoldenError(f"golden: the suite did not run: {code!r}")
    if code == pytest.ExitCode.TESTS_FAILED:
        raise GoldenError("golden: tests of the suite fail in the emulator itself")


def write(path: Path, device: str, results: dict) -> None:
    """A zip archive: an index in JSON, and the outputs one after the other."""
    index, content = {"format": FORMAT, "device": device, "launches": {}}, bytearray()
    for key, result in sorted(results.items(), key=lambda item: (item[1].test, item[0])):
        places = {}
        for number, output in result.outputs.items():
            places[number] = (len(content), len(output))
            content += output
        index["launches"][key] = {
            "test": result.test, "kernel": result.kernel, "instructions": result.instructions, "names": result.names,
            "outputs": places,
        }  # fmt: skip
    index["sha256"] = hashlib.sha256(content).hexdigest()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (("index.json", json.dumps(index, indent=1)), ("outputs.bin", bytes(content))):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


def read(path: Path) -> tuple[str, dict]:
    """The device and the results of a file. GoldenError: it is not one, of another format, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            index, content = json.loads(archive.read("index.json")), archive.read("outputs.bin")
        if index["format"] != FORMAT:
            raise GoldenError(f"golden: {path} has format {index['format']}, this version reads {FORMAT}: record again")
        if hashlib.sha256(content).hexdigest() != index["sha256"]:
            raise GoldenError(f"golden: {path} is damaged: its outputs are not what its index says")
        results = {
            key: Result(
                one["test"], one["kernel"], one["instructions"], one["names"],
                {int(i): content[at : at + size] for i, (at, size) in one["outputs"].items()},
            )
            for key, one in index["launches"].items()
        }  # fmt: skip
        return index["device"], results
    except OSError as problem:
        raise GoldenError(f"golden: cannot read {path}: {problem.strerror}") from None
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, EOFError) as problem:
        raise GoldenError(f"golden: {path} is not a golden file, or damaged: {problem}") from None


def record(path: Path, suite: Path, device) -> Recorder:
    """Run the suite on a device (None: the emulator stands in for it) and write what it gives."""
    recorder = Recorder(device)
    run_suite(suite, recorder)
    write(path, "emulator" if device is None else device.description, recorder.results)
    return recorder


def check(path: Path, suite: Path) -> tuple[str, Report]:
    """Run the suite in the emulator and compare with a file. Returns the device of the file and the report."""
    device, results = read(path)
    checker = Checker(results)
    run_suite(suite, checker)
    checker.report.missing = sorted(results[key].test for key in results.keys() - checker.seen)
    return device, checker.report
