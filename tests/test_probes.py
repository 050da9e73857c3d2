"""What calibration measures in short training, and how the fit takes it apart."""

import os
import time
from ast import literal_eval
from pathlib import Path

import pytest

pytest.importorskip("torch")

from executor.measure import Record
from executor.probe_links import SIZES, message_points
from executor.probe_steps import Found, Short, _add_messages, _Call, _Step, _step_point, _timed_mesh, _TimedAxis, short_plans
from executor.processes import run_ranks
from executor.transport import REAL_TIME_PRIORITY, hasten_transport, posting
from planner.cluster import load_cluster
from planner.model import load_model
from planner.plan import Decisions, even_stages


def short(**degrees) -> Short:
    model = load_model("tiny-gpt")
    pp = degrees.get("pipeline_parallel", 1)
    sizes = {"data_parallel": 1, "tensor_parallel": 1, "pipeline_parallel": 1, **degrees}
    decisions = Decisions(micro_batch_size=1, num_microbatches=2, stages=even_stages(model, "1F1B", pp, 1, "none"), **sizes)
    return Short(model, 64, "fp32", decisions)


def record(kind: str, start_ms: float, end_ms: float, stage: int = 0, microbatch: int = 0) -> Record:
    return Record(kind, stage, microbatch, int(start_ms * 1e6), int(end_ms * 1e6))


def test_collectives_are_taken_off_the_passes_that_they_lie_in() -> None:
    records = [record("F", 0, 10), record("B", 10, 30), record("REDUCE", 30, 36), record("OPTIMIZER", 36, 40)]
    calls = [_Call(2_000_000, 0.003), _Call(12_000_000, 0.004), _Call(31_000_000, 0.005)]
    late = [row._replace(end=row.end + 2_000_000) if row.kind == "OPTIMIZER" else row for row in records]
    steps = [[_Step(records, calls, 0.045)], [_Step(late, calls, 0.045)]]
    point = _step_point(short(tensor_parallel=2), steps)
    assert point.forward_seconds == pytest.approx((0.010 - 0.003) / 2)
    assert point.backward_seconds == pytest.approx((0.020 - 0.004) / 2)
    assert point.communication_seconds == pytest.approx(0.007)
    assert point.reduction_seconds == pytest.approx(0.006)
    assert point.rest_seconds == pytest.approx(0.006 + 0.005), "the optimizer to its last end, and what no action covers"


def test_a_message_counts_where_it_was_waited_for_and_a_late_receive_by_itself() -> None:
    first = [record("SEND_F", 10, 10.1, 0, 0), record("SEND_F", 20, 20.1, 0, 1)]
    second = [record("RECV_F", 5, 10.5, 1, 0), record("RECV_F", 25, 26.5, 1, 1)]
    found = Found([], [], [])
    _add_messages(found, short(pipeline_parallel=2), [[_Step(first, [], 0.1)], [_Step(second, [], 0.1)]], per_node=2)
    (message,) = found.messages
    assert (message.num_bytes, message.inside, message.in_training) == (64 * 64 * 4, True, True)
    assert message.seconds == pytest.approx(0.0005)
    (late,) = found.late_receives
    assert late.seconds == pytest.approx(0.0015) and late.inside
    across = Found([], [], [])
    _add_messages(across, short(pipeline_parallel=2), [[_Step(first, [], 0.1)], [_Step(second, [], 0.1)]], per_node=1)
    assert [point.inside for point in (*across.messages, *across.late_receives)] == [False, False]


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1), (3, 3)])
def test_short_plans_use_all_ranks(ranks: int, per_node: int) -> None:
    plans = short_plans("cpu", ranks, per_node)
    assert plans and all(plan.decisions.world_size == ranks for plan in plans)
    assert len({plan.model.hidden_size for plan in plans if plan.decisions.data_parallel == ranks}) > 1
    splits = {plan.decisions.tensor_parallel for plan in plans}
    assert (2 in splits) == (ranks in (2, 4))


def _communicate(rank: int, world: int, store: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from executor.mesh import make_mesh

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    log: list[_Call] = []
    mesh = _timed_mesh(make_mesh(short(tensor_parallel=2).decisions, rank), log)
    assert isinstance(mesh.tp, _TimedAxis) and not isinstance(mesh.dp, _TimedAxis)
    tensor = torch.full((4,), float(rank + 1))
    if rank:
        time.sleep(0.2)
    mesh.tp.all_reduce(tensor)
    work = mesh.tp.all_reduce(tensor, wait=False)
    assert len(log) == 1, "one that goes on is written down when it has been waited for"
    work.wait()
    assert tensor.tolist() == [6.0] * 4 and len(log) == 2
    if rank == 0:
        assert log[0].seconds > 0.1, "waiting for the last rank counts"
    Path(folder, str(rank)).write_text(repr((hasten_transport(), *_policies(), _posting_priorities())))
    dist.barrier()
    dist.destroy_process_group()


def _send(rank: int, world: int, store: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    points = list(message_points(torch.device("cpu"), world if world < 4 else 2))
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "points").write_text(repr([(point.inside, point.alone, point.seconds > 0) for point in points]))


@pytest.mark.parametrize(("ranks", "kinds"), [(3, [(True, False)]), (4, [(True, False), (False, False), (False, True)])])
def test_ranks_without_a_partner_wait_for_those_that_send(tmp_path: Path, ranks: int, kinds: list[tuple[bool, bool]]) -> None:
    run_ranks(ranks, _send, (str(tmp_path),))
    found = literal_eval((tmp_path / "points").read_text())
    assert [row[:2] for row in found] == [kind for kind in kinds for _ in SIZES]
    assert all(row[2] for row in found)


def test_timed_axes_communicate_and_write_down_their_collectives(tmp_path: Path) -> None:
    run_ranks(2, _communicate, (str(tmp_path),))
    for rank in range(2):
        number, threads, real_time, allowed, (meanwhile, after) = literal_eval((tmp_path / str(rank)).read_text())
        assert real_time == (threads if allowed else 0), "every thread of gloo's where the system allows it"
        assert number == threads if allowed else 0 <= number <= threads
        assert meanwhile > REAL_TIME_PRIORITY if allowed else meanwhile == 0, "gloo's threads can't interrupt who posts a message"
        assert after == 0


def _policies() -> tuple[int, int, bool]:
    """How many threads of this process are gloo's and how many of them are of real-time priority, and whether that is allowed."""
    if not hasattr(os, "sched_getscheduler"):
        return 0, 0, False
    threads = [int(folder.name) for folder in Path("/proc/self/task").iterdir() if "gloo" in (folder / "comm").read_text()]
    real_time = sum(os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR for thread in threads)
    usual = os.sched_getscheduler(0) == os.SCHED_OTHER and os.getpriority(os.PRIO_PROCESS, 0) <= 0
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY + 1))
    except PermissionError:
        return len(threads), real_time, False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return len(threads), real_time, usual


def _posting_priorities() -> tuple[int, int]:
    """This thread's real-time priority while it posts a message, and after it; 0 for none."""
    if not hasattr(os, "sched_getparam"):
        return 0, 0
    with posting():
        meanwhile = os.sched_getparam(0).sched_priority
    return meanwhile, os.sched_getparam(0).sched_priority


def test_hastening_without_gloo_does_nothing() -> None:
    assert hasten_transport() == 0


def test_the_preset_counts_no_waits() -> None:
    efficiency = load_cluster("cpu").efficiency
    assert efficiency.wait_seconds == efficiency.receive_seconds == 0.0 and efficiency.fresh_bandwidth_bytes_per_second is None
