"""Plans drawn over everything that the memory model knows."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st
from plans import make_plan

from planner.errors import InputError
from planner.model import load_model
from planner.plan import SCHEDULES, Plan, replace

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
