"""In which order things happen that the hardware leaves open."""

from __future__ import annotations

from dataclasses import dataclass

ORDERS = ("round_robin", "ascending", "descending", "random")
ASYNC = ("early", "late", "shuffled")


@dataclass(frozen=True)
class Schedule:
    """One order of events that a GPU could show.

    Attributes:
        order: Whose turn is next: ``"round_robin"``; ``"ascending"`` or ``"descending"``, where the first warp that can
            run goes on until it must wait; ``"random"``.
        quantum: Instructions of a warp's turn (of a random turn: at most so many).
        asynchronous: When copies and warpgroup products take place: ``"early"`` as they are issued, ``"late"`` when
            someone waits for them or nothing else can go on, ``"shuffled"`` at random and in any order.
        seed: Of everything random.
        blocks_reversed: The last block of the grid runs first.
    """

    order: str = "round_robin"
    quantum: int = 1
    asynchronous: str = "late"
    seed: int = 0
    blocks_reversed: bool = False

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"Schedule: order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.asynchronous not in ASYNC:
            raise ValueError(f"Schedule: asynchronous must be one of {', '.join(ASYNC)}, got {self.asynchronous!r}")
        if self.quantum < 1:
            raise ValueError(f"Schedule: quantum must be at least 1, got {self.quantum}")


# Warps that run far ahead of others show missing barriers in the data; late copies show missing waits; early and
# shuffled ones show who relies on their being late.
SCHEDULES = {
    "default": Schedule(quantum=64),
    "lockstep": Schedule(quantum=1),
    "lockstep_early": Schedule(quantum=1, asynchronous="early"),
    "ahead": Schedule("ascending"),
    "ahead_early": Schedule("ascending", asynchronous="early"),
    "behind": Schedule("descending", blocks_reversed=True),
    "behind_early": Schedule("descending", asynchronous="early"),
    "random_0": Schedule("random", 7, "shuffled", seed=0),
    "random_1": Schedule("random", 50, "shuffled", seed=1, blocks_reversed=True),
    "random_2": Schedule("random", 300, "late", seed=2),
}


def named(schedules: str | Schedule | list | tuple) -> dict[str, Schedule]:
    """Schedules by name: ``"all"``, one name, a `Schedule`, or several of these.

    Raises:
        ValueError: there is no schedule of that name.
    """
    if schedules == "all":
        return dict(SCHEDULES)
    if isinstance(schedules, Schedule):
        return {repr(schedules): schedules}
    if isinstance(schedules, str):
        if schedules not in SCHEDULES:
            raise ValueError(f"ptx: no schedule {schedules!r}; there are all, {', '.join(SCHEDULES)}")
        return {schedules: SCHEDULES[schedules]}
    return {name: one for group in schedules for name, one in named(group).items()}
