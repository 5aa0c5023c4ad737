"""A host and a GPU whose time passes only as told, for what measures them."""

import contextlib
from types import SimpleNamespace


class Machine:
    """A clock of the host, and a device that works off what is launched, in order.

    `install` puts it in the place of the clock and of torch.cuda in a module. A function to be timed calls `work`.
    """

    def __init__(self):
        self.now = 0.0  # seconds on the host
        self.free_at = 0.0  # when the device has done all that was launched
        self.captured = None  # seconds of device work, while a graph is captured

    def install(self, monkeypatch, module):
        cuda = SimpleNamespace(
            device=lambda device: contextlib.nullcontext(),
            Event=lambda enable_timing: Event(self),
            Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            stream=lambda stream: contextlib.nullcontext(),
            CUDAGraph=lambda: Graph(self),
            graph=lambda graph: graph,
        )
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, device=module.torch.device))

    def work(self, host=0.0, device=0.0):
        """What takes the host and then the device so long."""
        self.now += host
        if self.captured is not None:
            self.captured += device
        elif device:
            self.free_at = max(self.now, self.free_at) + device


class Event:
    def __init__(self, machine):
        self.machine, self.at, self.is_waited_for = machine, None, False

    def record(self):
        self.at = max(self.machine.now, self.machine.free_at)

    def synchronize(self):
        self.machine.now, self.is_waited_for = max(self.machine.now, self.at), True

    def elapsed_time(self, end):
        assert end.is_waited_for, "torch raises where the end was not reached"
        return (end.at - self.at) * 1000


class Graph:
    """Both the graph and the context that captures it."""

    LAUNCH = 5e-6

    def __init__(self, machine):
        self.machine, self.seconds = machine, None

    def __enter__(self):
        self.machine.captured = 0.0

    def __exit__(self, *raised):
        self.seconds, self.machine.captured = self.machine.captured, None

    def replay(self):
        self.machine.work(self.LAUNCH, self.seconds)
