"""The memory wall, from Python: what GPT-3 175B needs to train, and what one GPU of a 1,024-GPU job then holds.

    python examples/estimate_gpt3.py
"""

from planner.cluster import load_cluster
from planner.defaults import Fixed, complete
from planner.estimate import memory_wall, predict
from planner.model import load_model
from planner.plan import Training

GB, GIB = 1e9, 2**30


def main() -> None:
    model, cluster = load_model("gpt3"), load_cluster("a100-80gb:1024")
    training = Training(global_batch_size=1536, sequence_length=2048)

    whole = memory_wall(model, cluster, training, num_tokens=300e9)
    memory, wall = whole.memory, whole.wall
    assert wall is not None
    print(f"{model.name}: {model.num_parameters:,} parameters")
    parts = {"weights": memory.weights_bytes, "gradients": memory.gradients_bytes, "Adam": memory.optimizer_bytes}
    print(" + ".join(f"{name} {size / GB:,.0f} GB" for name, size in parts.items()))
    print(f"= {memory.total_bytes / GB:,.0f} GB before any activation: {wall.num_gpus_for_states} x {wall.gpu}")
    print(f"300B tokens: {wall.training_flops:.2e} FLOPs, {wall.v100_years:,.0f} V100-years at 28 TFLOP/s")

    fixed = Fixed(tensor_parallel=8, pipeline_parallel=8, data_parallel=16, micro_batch_size=1, zero_stage=1, recompute="full")
    completed = complete(model, cluster, training, fixed, batch_given=True)
    predictions = predict(completed.inputs, completed.decisions)
    print("\nSplit as tensor 8 x pipeline 8 x data 16, with full recomputation:")
    for rank in predictions.pipeline_ranks:
        print(
            f"  pipeline rank {rank.pipeline_rank}: {rank.memory.total_bytes / GIB:5.1f} GiB a GPU,"
            f" {rank.num_in_flight} micro-batches in flight, {(rank.headroom_bytes or 0) / GIB:.1f} GiB free"
        )
    time = predictions.time
    print(f"  step {time.step_seconds:.1f} s, bubble {time.bubble_fraction:.1%}, MFU {time.model_flops_utilization:.1%}")


if __name__ == "__main__":
    main()
