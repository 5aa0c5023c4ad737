"""The ranks of one job use what rank 0 found; two processes, gloo."""

import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist

import fusedops
from fusedops._core import env
from fusedops._core.device import INTERPRETER
from fusedops._core.register import operators
from fusedops._core.tuning import store
from fusedops._core.tuning.entry import Entry
from fusedops.testing import make_tensor
from fusedops.tuning import Options
from tests.core.tuning_problems import Clock

FAVOURITES = ("block_m=2 num_warps=1", "block_m=1 num_warps=1")  # by each rank's own clock


def in_ranks(tmp_path, work):
    """What work(rank) returned in each of two ranks, each with a user's folder of its own."""

    def run(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        with env.override("FUSEDOPS_CACHE_DIR", str(tmp_path / str(rank))), env.override("FUSEDOPS_BACKEND", "triton"):
            torch.use_deterministic_algorithms(False)
            store.forget_memory()
            operators()["rms_norm"].module("triton").FORWARD.space = {"block_m": (1, 2), "num_warps": (1,)}
            (tmp_path / f"{rank}.json").write_text(json.dumps(work(rank)))
        dist.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def norm(rank):
    return make_tensor((4, 256), torch.float16, seed=rank), make_tensor((256,), torch.float16, seed=7)


def test_ranks_use_what_rank_0_found(tmp_path):
    def work(rank):
        clock = Clock(lambda name: 0.5 if name == FAVOURITES[rank] else 1.0)
        report = fusedops.tune("rms_norm", *norm(rank), tuning=Options(timer=clock))
        explanation = fusedops.explain("rms_norm", *norm(rank))
        return [len(clock.rounds), str(report.tuned[0].config), explanation.config, explanation.config_source]

    (measured, *first), (followed, *second) = in_ranks(tmp_path, work)
    assert first == second and first[1] == "RowConfig(block_m=2, block_n=256, num_warps=1)"
    assert measured > 0 and followed == 0
    assert len(list(tmp_path.glob("0/tuning/**/*.json"))) == 1 and not list(tmp_path.glob("1/tuning/**/*.json"))


def test_ranks_use_what_rank_0_knew(tmp_path):
    """Rank 0 finds its result on the disk and measures nothing; the other has it all the same."""

    def work(rank):
        if rank == 0:
            x, weight = norm(rank)
            tunable = operators()["rms_norm"].module("triton").FORWARD
            key = tunable.key(INTERPRETER, (256,), (x.dtype, weight.dtype, False, "once"))
            store.current_store().put(Entry(key, {"block_m": 2, "num_warps": 1}, date="2026-01-01"))
            store.forget_memory()
        options = Options(timer=lambda *rest: pytest.fail("measured"))
        report = fusedops.tune("rms_norm", *norm(rank), tuning=options)
        return [str(report.tuned[0].config), fusedops.explain("rms_norm", *norm(rank)).config]

    first, second = in_ranks(tmp_path, work)
    assert first == second == ["RowConfig(block_m=2, block_n=256, num_warps=1)"] * 2


def test_no_rank_waits_for_one_that_failed(tmp_path):
    def work(rank):
        def broken(calls, arguments, device):
            raise OSError("the clock stands still")

        try:
            fusedops.tune("rms_norm", *norm(rank), tuning=Options(timer=broken))
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    first, second = in_ranks(tmp_path, work)
    assert first == "OSError: the clock stands still"
    assert second == "RuntimeError: tune: rank 0 failed: OSError: the clock stands still"
