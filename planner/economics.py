"""Days, GPU-hours, cost and energy of a whole training run, from the time of one step."""

from __future__ import annotations

from planner.plan import Inputs, Time, replace

HOURS_PER_YEAR = 365.25 * 24


def with_training_run(time: Time, inputs: Inputs, num_tokens: float | None) -> Time:
    """`time` with what follows from training on `num_tokens`: days, GPU-hours and GPU-years, the cost where the cluster has a
    price, and the energy where the GPU's power is known.

    Every GPU is paid for, and draws its full power, for the whole of the run; nothing is added for restarts or cooling.
    """
    if num_tokens is None or time.tokens_per_second is None:
        return time
    cluster = inputs.cluster
    hours = num_tokens / time.tokens_per_second / 3600
    gpu_hours = hours * cluster.num_gpus
    return replace(
        time,
        training_days=hours / 24,
        gpu_hours=gpu_hours,
        gpu_years=gpu_hours / HOURS_PER_YEAR,
        cost=None if cluster.price_per_gpu_hour is None else gpu_hours * cluster.price_per_gpu_hour,
        energy_kwh=None if cluster.gpu.power_watts is None else gpu_hours * cluster.gpu.power_watts / 1000,
    )
