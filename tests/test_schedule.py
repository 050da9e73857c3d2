from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from itertools import permutations

import pytest

from planner.errors import InputError
from planner.plan import SCHEDULES, SPLIT_BACKWARD_SCHEDULES, check_schedule, stage_ranks
from planner.schedule import COMPUTE_KINDS, IN_TURN_SCHEDULES, Action, Actions, actions, compute_actions, num_in_flight
from planner.timeline import DeadlockError, bubble_fraction, bubble_fractions, busy_seconds, chrome_trace, simulate

VIRTUAL = {"Interleaved1F1B": (2, 3), "InterleavedZeroBubble": (2, 3), "ZBVZeroBubble": (2,)}


def cases():
    for name in SCHEDULES:
        for virtual in VIRTUAL.get(name, (1,)):
            for p in (2, 3, 4, 8):
                for m in (1, 2, 3, 4, 7, 8, 16, 24):
                    try:
                        check_schedule(name, p, virtual, m, "case")
                    except InputError:
                        continue
                    yield name, p, virtual, m


CASES = list(cases())


def unit(action: Action) -> float:
    return {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}.get(action.kind, 0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_runs_once_on_its_rank_and_in_order(name: str) -> None:
    for _, p, virtual, m in (case for case in CASES if case[0] == name):
        owners = stage_ranks(name, p, virtual)
        kinds = "FIW" if name in SPLIT_BACKWARD_SCHEDULES else "FB"
        expected = Counter((kind, stage, index) for kind in kinds for stage in range(p * virtual) for index in range(m))
        lists = compute_actions(name, p, virtual, m)
        assert Counter(action for actions in lists for action in actions) == expected
        for rank, mine in enumerate(lists):
            assert all(owners[action.stage] == rank for action in mine)
            position = {action: index for index, action in enumerate(mine)}
            for kind, stage, index in mine:
                if kind in "BI":
                    assert position["F", stage, index] < position[kind, stage, index]
                if kind == "W":
                    assert position["I", stage, index] < position["W", stage, index]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_waits_for_itself_and_sends_match_receives(name: str) -> None:
    for _, p, virtual, m in (case for case in CASES if case[0] == name):
        lists = actions(name, p, virtual, m)
        timeline = simulate(lists, unit, lambda action: 0.5)
        sent = Counter((event.kind[-1], event.stage + (1 if event.kind[-1] == "F" else -1), event.microbatch)
                       for event in timeline.events if event.kind.startswith("SEND"))  # fmt: skip
        received = Counter((event.kind[-1], event.stage, event.microbatch) for event in timeline.events if event.kind.startswith("RECV"))
        assert sent == received
        reduced = [event for event in timeline.events if event.kind == "REDUCE"]
        assert sorted(event.stage for event in reduced) == list(range(p * virtual))


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_the_bubble_is_the_published_formula(name: str) -> None:
    for p in (1, 2, 4, 8):
        for m in (1, 4, 16):
            timeline = simulate(actions(name, p, 1, m), unit, lambda action: 0.0)
            assert bubble_fraction(timeline) == pytest.approx((p - 1) / (m + p - 1))


def test_interleaving_divides_the_bubble() -> None:
    for p, v, m in ((2, 2, 8), (4, 3, 8), (8, 2, 16)):
        timeline = simulate(actions("Interleaved1F1B", p, v, m), unit, lambda action: 0.0)
        assert bubble_fraction(timeline) == pytest.approx((p - 1) / (v * m + p - 1))


def test_naive_model_parallel_keeps_one_rank_busy() -> None:
    for p in (2, 4, 8):
        timeline = simulate(actions("Naive", p, 1, 3), unit, lambda action: 0.0)
        assert all(fraction == pytest.approx(1 - 1 / p) for fraction in bubble_fractions(timeline).values())


@pytest.mark.parametrize("name", sorted(SPLIT_BACKWARD_SCHEDULES))
def test_splitting_the_backward_beats_interleaving(name: str) -> None:
    for p, m in ((2, 8), (4, 16), (8, 32)):
        split = simulate(actions(name, p, 2, m), unit, lambda action: 0.0)
        whole = simulate(actions("Interleaved1F1B", p, 2, m), unit, lambda action: 0.0)
        assert bubble_fraction(split) < bubble_fraction(whole) / 2


def test_in_flight_counts_are_those_of_the_papers() -> None:
    assert [num_in_flight(mine) for mine in compute_actions("GPipe", 4, 1, 8)] == [8] * 4
    assert [num_in_flight(mine) for mine in compute_actions("1F1B", 4, 1, 8)] == [4, 3, 2, 1]
    # Narayanan et al. 2021: p·v·(1 + (p - 1)/(p·v)) chunks on the first rank
    assert num_in_flight(compute_actions("Interleaved1F1B", 4, 3, 16)[0]) == 4 * 3 + 3
    # Qi et al. 2024: the V shape evens the memory out at that of 1F1B, 2p half-size stages
    assert [num_in_flight(mine) for mine in compute_actions("ZBVZeroBubble", 4, 2, 16)] == [8] * 4


def test_a_circle_is_found() -> None:
    lists = ((Action("RECV_F", 0, 0),), (Action("RECV_F", 1, 0),))
    with pytest.raises(DeadlockError):
        simulate(lists, unit, lambda action: 0.0)


def test_busy_time_and_trace() -> None:
    import json

    timeline = simulate(actions("1F1B", 2, 1, 4), unit, lambda action: 0.0)
    assert busy_seconds(timeline) == {0: 12.0, 1: 12.0}
    trace = json.loads(chrome_trace([timeline]))
    spans = [row for row in trace["traceEvents"] if row["ph"] == "X"]
    assert len(spans) == len(timeline.events) and {row["pid"] for row in spans} == {0, 1}


def test_replicas_that_start_apart_keep_their_own_bubble() -> None:
    from planner.timeline import Timeline

    one = simulate(actions("1F1B", 2, 1, 4), unit, lambda action: 0.0)
    late = tuple(event._replace(rank=event.rank + 2, start=event.start + 100, end=event.end + 100) for event in one.events)
    both = Timeline(source="measured", events=one.events + late)
    assert bubble_fraction(both) > 0.8
    assert bubble_fraction(both, {0: "a", 1: "a", 2: "b", 3: "b"}) == pytest.approx(bubble_fraction(one))


def walked_in_turn(lists: tuple[Actions, ...], seconds: Callable[[str, int], float], in_turn: bool) -> float:
    """Seconds of a step in which a message waits until the receiver has begun to wait for the one before it on its channel."""
    clocks, positions = [0.0] * len(lists), [0] * len(lists)
    sent: dict[tuple[str, int, int], float] = {}
    awaited: dict[tuple[str, int, int], float] = {}
    before: dict[tuple[str, int], tuple[str, int, int]] = {}
    ends: dict[tuple[str, int, int], float] = {}

    def act(rank: int, kind: str, stage: int, microbatch: int) -> bool:
        if kind in COMPUTE_KINDS:
            step = {"F": -1, "I": 1, "B": 1}.get(kind)
            ready = ends.get((kind, stage + step, microbatch), 0.0) if step else 0.0
            clocks[rank] = ends[kind, stage, microbatch] = max(clocks[rank], ready) + seconds(kind, stage)
        elif kind.startswith("RECV"):
            message = (kind[-1], stage, microbatch)
            awaited.setdefault(message, clocks[rank])
            if message not in sent:
                return False
            clocks[rank] = max(clocks[rank], sent[message])
        elif kind.startswith("SEND"):
            last = before.get((kind[-1], stage))
            if in_turn and last is not None:
                if last not in awaited:
                    return False
                clocks[rank] = max(clocks[rank], awaited[last])
            message = (kind[-1], stage + (1 if kind == "SEND_F" else -1), microbatch)
            before[kind[-1], stage] = message
            sent[message] = clocks[rank]
        return True

    while any(position < len(order) for position, order in zip(positions, lists, strict=True)):
        start = list(positions)
        for rank, order in enumerate(lists):
            while positions[rank] < len(order) and act(rank, *order[positions[rank]]):
                positions[rank] += 1
        assert positions != start, "the ranks wait for each other"
    return max(clocks)


def meeting(lists: tuple[Actions, ...], owners: tuple[int, ...], in_turn: bool, channel: Callable[[str, int, int], Hashable]) -> str:
    """What happens where messages have no tags, and those of a channel are done one after the other, each when both ranks have come to it.

    `channel` is given a message's direction, sender and receiver. A rank goes on when it has posted a message, and waits for what it
    receives and, `in_turn`, before it sends, for the message before from the same stage. Returns "done", "mixed up" or "stuck".
    """
    queues: list[dict[Hashable, deque[Action]]] = [defaultdict(deque) for _ in lists]
    awaited: list[Action | None] = [None] * len(lists)
    sent: list[dict[tuple[str, int], Action]] = [{} for _ in lists]
    positions, under_way, mixed_up = [0] * len(lists), set[Action](), False

    def go_on(rank: int) -> None:
        for action in lists[rank][positions[rank] :]:
            if awaited[rank] in under_way:
                return
            kind, stage, _ = action
            if kind[:4] in ("SEND", "RECV"):
                if kind[:4] == "SEND" and in_turn and sent[rank].get((kind, stage)) in under_way:
                    return
                step = 1 if kind in ("SEND_F", "RECV_B") else -1
                ends = (stage, stage + step) if kind[:4] == "SEND" else (stage + step, stage)
                queues[rank][channel(kind[-1], owners[ends[0]], owners[ends[1]])].append(action)
                under_way.add(action)
                if kind[:4] == "SEND":
                    sent[rank][kind, stage] = action
                else:
                    awaited[rank] = action
            positions[rank] += 1

    def meet(mine: deque[Action], theirs: deque[Action]) -> bool:
        """Whether the first of two queues of a channel are a send and a receive, which then are done."""
        nonlocal mixed_up
        if not mine or not theirs or (mine[0].kind[:4], theirs[0].kind[:4]) != ("SEND", "RECV"):
            return False
        one, other = mine.popleft(), theirs.popleft()
        under_way.difference_update((one, other))
        step = 1 if one.kind == "SEND_F" else -1
        mixed_up = mixed_up or other != Action(f"RECV_{one.kind[-1]}", one.stage + step, one.microbatch)
        return True

    moved = True
    while moved:
        before = list(positions)
        for rank in range(len(lists)):
            go_on(rank)
        pairs = [(queues[a][name], queues[b][name]) for a, b in permutations(range(len(lists)), 2) for name in set(queues[a]) & set(queues[b])]
        moved = any([meet(*pair) for pair in pairs]) or positions != before
    if under_way or any(position < len(order) for position, order in zip(positions, lists, strict=True)):
        return "stuck"
    return "mixed up" if mixed_up else "done"


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(
    ("schedule", "v"),
    [("Naive", 1), ("GPipe", 1), ("1F1B", 1), ("ZBVZeroBubble", 2)]
    + [(schedule, v) for schedule in ("Interleaved1F1B", "InterleavedZeroBubble") for v in (2, 3, 4)],
)
def test_messages_without_tags_arrive_where_each_channel_has_its_own_line(schedule: str, v: int, p: int, m: int) -> None:
    lists, owners = actions(schedule, p, v, m), stage_ranks(schedule, p, v)
    assert meeting(lists, owners, schedule in IN_TURN_SCHEDULES, lambda direction, source, target: (direction, source, target)) == "done"


def test_messages_without_tags_need_a_channel_for_each_direction_and_pair() -> None:
    def outcome(schedule: str, p: int, channel: Callable[[str, int, int], Hashable]) -> str:
        return meeting(actions(schedule, p, 2, 4), stage_ranks(schedule, p, 2), schedule in IN_TURN_SCHEDULES, channel)

    def pair(direction: str, source: int, target: int) -> Hashable:
        return direction, frozenset((source, target))

    assert outcome("Interleaved1F1B", 2, pair) == "stuck"
    assert outcome("ZBVZeroBubble", 4, pair) == "stuck"
    assert outcome("InterleavedZeroBubble", 2, lambda direction, source, target: (source, target)) == "mixed up"


@pytest.mark.parametrize("schedule", sorted(IN_TURN_SCHEDULES))
@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 24])
def test_messages_in_turn_neither_block_nor_delay(schedule: str, p: int, m: int) -> None:
    lists = actions(schedule, p, 2 if schedule == "ZBVZeroBubble" else 1, m)
    for share in (0.0, 0.3, 0.6):  # stages differ by up to that share, in no order

        def seconds(kind: str, stage: int, share: float = share) -> float:
            return (2.0 if kind == "B" else 1.0) * (1.0 + share * (stage * 5 % 7) / 6)

        assert walked_in_turn(lists, seconds, True) == pytest.approx(walked_in_turn(lists, seconds, False), rel=1e-12)
