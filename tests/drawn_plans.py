"""Plans drawn over everything that the memory model knows, and how far a prediction is from a dry run."""

from __future__ import annotations

from unittest import mock

from hypothesis import assume
from hypothesis import strategies as st
from plans import make_plan

from executor.dry_run import dry_run_rank
from executor.measure import CATEGORIES, StorageTracker
from planner.errors import InputError
from planner.model import load_model
from planner.plan import SCHEDULES, Memory, Plan, replace

VIRTUAL = {"Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans over both block families, shapes, degrees, ZeRO, recomputation, schedules, precisions and optimizers."""
    family = draw(st.sampled_from(["tiny-gpt", "tiny-llama"]))
    heads = draw(st.sampled_from([4, 8]))
    hidden = draw(st.sampled_from([32, 64, 96, 192]))
    model = replace(
        load_model(family),
        num_layers=draw(st.integers(2, 8)),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads if family == "tiny-gpt" else draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([8, 16, 32])),
        ffn_hidden_size=hidden * draw(st.sampled_from([2, 4])),
        vocab_size=draw(st.sampled_from([50, 256, 1000, 5000])),
        tied_embeddings=draw(st.booleans()),
    )
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    schedule = draw(st.sampled_from(SCHEDULES))
    virtual = VIRTUAL.get(schedule, 1)
    zero = draw(st.integers(0, 3)) if dp > 1 else 0
    try:
        return make_plan(
            model,
            tp=tp,
            pp=pp,
            dp=dp,
            zero_stage=zero,
            sequence_parallel=tp > 1 and draw(st.booleans()),
            micro=draw(st.integers(1, 3)),
            m=draw(st.sampled_from([1, 2, 4, 8])),
            schedule=schedule,
            virtual=virtual,
            data_parallel_replicate=draw(st.sampled_from([1, 2])) if zero and dp == 4 else 1,
            sequence_length=draw(st.sampled_from([32, 64, 128])),
            precision=draw(st.sampled_from(["mixed-bf16", "fp32", "bf16"])),
            optimizer=draw(st.sampled_from(["adam", "sgd"])),
            recompute=draw(st.sampled_from(["none", "selective", "full"])),
            attention=draw(st.sampled_from([None, "fused", "unfused", "unfused"])),
        )
    except InputError:
        assume(False)
        raise


SMALL = 0.002
"""Share of a rank's total up to which a category's difference does not count."""
AS_HIGH = 1e-4
"""Moments whose totals differ by less are peaks both: a scalar of 4 bytes decides which is the higher one."""


def category_error(predicted: Memory, plan: Plan, rank: int, traced: Memory) -> float:
    """The largest relative difference of any category, at the moment of the dry run that agrees best among those as high as its peak."""
    error = _category_error(predicted, traced)
    if error <= 0.02:
        return error
    with mock.patch("executor.rank.StorageTracker", Moments):
        dry_run_rank(plan, rank)
    return min(_category_error(predicted, moment) for moment in Moments.last.peaks())


def _category_error(predicted: Memory, traced: Memory) -> float:
    error = 0.0
    for name in CATEGORIES:
        difference = abs(getattr(predicted, f"{name}_bytes") - getattr(traced, f"{name}_bytes"))
        if difference > SMALL * traced.total_bytes:
            error = max(error, difference / max(getattr(traced, f"{name}_bytes"), 1))
    return error


class Moments(StorageTracker):
    """A tracker that remembers the breakdown of every moment as high as the peak. `last` is the newest one."""

    last: Moments

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, ...], None] = {}
        Moments.last = self

    def _count(self, category: str, size: int) -> None:
        super()._count(category, size)
        if self.total >= (1 - AS_HIGH) * self.peak_total:
            self.seen[tuple(self.totals[name] for name in CATEGORIES)] = None

    def peaks(self) -> list[Memory]:
        return [Memory.of(*parts) for parts in self.seen if sum(parts) >= (1 - AS_HIGH) * self.peak_total]
