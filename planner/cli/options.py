"""The options that commands share, and what they become: inputs, and the decisions that the user has fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from planner.cluster import ClusterSpec, load_cluster, presets, with_num_gpus
from planner.defaults import Fixed
from planner.errors import InputError
from planner.model import ModelSpec, load_model
from planner.plan import ATTENTIONS, RECOMPUTE_LEVELS, SCHEDULES, Inputs, Training, replace
from planner.software import load_software
from planner.values import whole_number

if TYPE_CHECKING:
    from planner.candidates import Constraints

PRECISIONS = ("mixed-bf16", "fp32", "bf16")
OPTIMIZERS = ("adam", "sgd")
PROFILES = ("meshwright", "megatron")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the user said; None where nothing was said."""

    model: str
    cluster: str | None
    global_batch_size: int | None
    sequence_length: int | None
    precision: str
    optimizer: str
    profile: str
    program: str | None
    attention: str | None
    memory_fraction: float
    tensor_parallel: int | None
    pipeline_parallel: int | None
    data_parallel: int | None
    zero_stage: int | None
    data_parallel_replicate: int | None
    micro_batch_size: int | None
    schedule: str | None
    num_virtual_stages: int | None
    recompute: str | None
    sequence_parallel: bool | None
    num_tokens: float | None
    price_per_gpu_hour: float | None

    @property
    def has_degrees(self) -> bool:
        return any(
            value is not None
            for value in (
                self.tensor_parallel,
                self.pipeline_parallel,
                self.data_parallel,
                self.zero_stage,
                self.data_parallel_replicate,
                self.micro_batch_size,
                self.schedule,
                self.num_virtual_stages,
                self.recompute,
                self.sequence_parallel,
            )
        )


MOST = 10**9
"""The largest integer that an option takes."""


class _Positive(click.ParamType[int]):
    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        if not 1 <= number <= MOST:
            raise InputError(param.opts[0] if param else "option", value, f"a positive integer is expected, at most {MOST:,}")
        return number


class _Choice(click.Choice[str]):
    """A choice whose error names the option, the value and what is allowed on one line."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            allowed = ", ".join(str(choice) for choice in self.choices)
            raise InputError(param.opts[0] if param else "option", value, f"one of {allowed} is expected") from None


class Number(click.ParamType[float]):
    """A number, as a plain or scientific figure (`300e9`): positive, or what `allows` says."""

    name = "NUMBER"

    def __init__(self, allows: Callable[[float], bool] = lambda number: 0 < number < 1e30, allowed: str = "a positive number below 1e30") -> None:
        self.allows, self.allowed = allows, allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not self.allows(number):
            raise InputError(param.opts[0] if param else "option", value, f"{self.allowed} is expected")
        return number


POSITIVE = _Positive()
NUMBER = Number()
FRACTION = Number(lambda number: 0 < number <= 1, "a fraction above 0 and at most 1")
GAP = Number(lambda number: 0 <= number < 1, "a fraction from 0 to below 1")
DEFAULT_TIME_LIMIT, DEFAULT_GAP = 60.0, 0.01


def choice(values: tuple[str, ...]) -> click.ParamType[str]:
    """An option's choice among `values`."""
    return _Choice(values, case_sensitive=False)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--model", required=True, help="A preset, an HF config.json (file or folder), or package.module:callable."),
    click.option("--cluster", help="PRESET:NUM_GPUS, such as a100-80gb:1024, or a cluster file."),
    click.option("--global-batch-size", type=POSITIVE, help="Samples per optimizer step, over all ranks."),
    click.option("--sequence-length", type=POSITIVE, help="Tokens per sample. Default: the model's longest, at most 4096."),
    click.option("--precision", type=choice(PRECISIONS), default="mixed-bf16", show_default=True, help="mixed-bf16: 2 + 2 + 12 bytes a parameter."),
    click.option("--optimizer", type=choice(OPTIMIZERS), default="adam", show_default=True),
    click.option("--profile", type=choice(PROFILES), default="meshwright", show_default=True, help="Whose implementation's memory is predicted."),
    click.option(
        "--program", help="Another program whose step time to predict, such as megatron-2021, nemo or torchtitan. Default: that of the profile."
    ),
    click.option(
        "--attention", type=choice(ATTENTIONS), help="fused: scores are never stored (default); unfused: they are, which megatron's formula assumes."
    ),
    click.option("--memory-fraction", type=FRACTION, default=1.0, show_default=True, help="Of a GPU's memory that may be used."),
    click.option("--tensor-parallel", "--tp", "tensor_parallel", type=POSITIVE),
    click.option("--pipeline-parallel", "--pp", "pipeline_parallel", type=POSITIVE),
    click.option("--data-parallel", "--dp", "data_parallel", type=POSITIVE),
    click.option("--zero-stage", type=click.IntRange(0, 3), help="0 replicates, 1 shards optimizer state, 2 also gradients, 3 also weights."),
    click.option("--data-parallel-replicate", type=POSITIVE, help="Replicas of the ranks that ZeRO shards over (HSDP); 1: it shards over all."),
    click.option("--micro-batch-size", type=POSITIVE),
    click.option("--schedule", type=choice(SCHEDULES)),
    click.option("--num-virtual-stages", type=POSITIVE, help="Stages per pipeline rank, with interleaved schedules."),
    click.option("--recompute", type=choice(RECOMPUTE_LEVELS)),
    click.option("--sequence-parallel/--no-sequence-parallel", "sequence_parallel", default=None),
    click.option("--num-tokens", type=NUMBER, help="Tokens of the whole training run, for days and cost."),
    click.option("--price-per-gpu-hour", type=NUMBER, help="In your currency; gives the cost of the run."),
)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `plan estimate` and `plan solve` to a command, which gets them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_SOLVER_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--time-limit", type=NUMBER, default=DEFAULT_TIME_LIMIT, show_default=True, help="Seconds; then the best plan found, with its gap."),
    click.option("--gap", type=GAP, default=DEFAULT_GAP, show_default=True, help="Enough after 7 CPU-seconds; 0: prove it."),
    click.option("--forbid", multiple=True, metavar="DECISION=VALUE", help="A value that a decision must not take: schedule=GPipe. Repeatable."),
    click.option("--rank-order", metavar="AXES", help="Mesh axes from the fastest varying: tp-dp-pp."),
    click.option("--free-cuts", is_flag=True, help="Cut anywhere with several stages a rank, too; a proof then takes minutes."),
    click.option("--solver", type=choice(("HiGHS", "CBC")), help="Default: HiGHS, or CBC where it is missing."),
)


def solver_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of the search to a command, which gets them as keywords."""
    for option in reversed(_SOLVER_OPTIONS):
        command = option(command)
    return command


def constraints_of(options: dict[str, Any]) -> Constraints:
    """The Constraints in a command's keywords, which are taken out of `options`."""
    from planner.candidates import FORBIDDABLE, Constraints

    forbidden = []
    for text in options.pop("forbid"):
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in FORBIDDABLE:
            raise InputError("--forbid", text, f"DECISION=VALUE is expected, with a decision of {', '.join(FORBIDDABLE)}")
        forbidden.append((name, _decision_value(name, value.strip())))
    order = options.pop("rank_order")
    axes = tuple(order.split("-")) if order is not None else None
    if axes is not None and sorted(axes) != ["dp", "pp", "tp"]:
        raise InputError("--rank-order", order, "tp, dp and pp, each once, such as tp-dp-pp")
    return Constraints(
        rank_order=axes,
        forbidden=tuple(forbidden),
        time_limit_seconds=options.pop("time_limit"),
        accepted_gap=options.pop("gap"),
        free_cuts=options.pop("free_cuts"),
        solver=options.pop("solver"),
    )


def _decision_value(name: str, text: str) -> object:
    """The value of a decision that `text` means."""
    if (name == "schedule" and text in SCHEDULES) or (name == "recompute" and text in RECOMPUTE_LEVELS):
        return text
    if name == "sequence_parallel" and text in ("true", "false"):
        return text == "true"
    if name == "rank_order" and sorted(text.split("-")) == ["dp", "pp", "tp"]:
        return tuple(text.split("-"))
    if name not in ("schedule", "recompute", "sequence_parallel", "rank_order") and (number := whole_number(text)) is not None:
        return number
    raise InputError("--forbid", f"{name}={text}", f"a value that {name} can take is expected")


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else there.")


def request_of(options: dict[str, Any]) -> Request:
    """The Request in a command's keywords, which are taken out of `options`."""
    return Request(**{field.name: options.pop(field.name) for field in dataclasses.fields(Request)})


def model_of(request: Request) -> ModelSpec:
    return load_model(request.model)


def sequence_length_of(request: Request, model: ModelSpec) -> int:
    """What was asked for, or the model's longest up to 4096."""
    return checked_length(request.sequence_length or min(model.max_sequence_length, 4096), model)


def checked_length(length: int, model: ModelSpec) -> int:
    """`length`, which the model must have positions for."""
    if model.position_embedding == "learned" and length > model.max_sequence_length:
        raise InputError("--sequence-length", length, f"{model.name} has {model.max_sequence_length} learned positions")
    return length


def cluster_of(request: Request) -> ClusterSpec:
    """The cluster named, or as many A100s as the degrees need."""
    product = (request.tensor_parallel or 1) * (request.pipeline_parallel or 1) * (request.data_parallel or 1)
    if request.cluster is None:
        cluster = with_num_gpus(presets()["a100-80gb"], product)
    else:
        cluster = load_cluster(request.cluster)
        if ":" not in request.cluster and request.has_degrees and cluster.num_gpus % product:
            cluster = with_num_gpus(cluster, product)
    if request.price_per_gpu_hour is not None:
        cluster = replace(cluster, price_per_gpu_hour=request.price_per_gpu_hour)
    return cluster


def cluster_to_fill(request: Request) -> ClusterSpec:
    """The cluster named. Raises InputError where the memory fraction leaves nothing of its GPUs' memory beside what is reserved."""
    cluster = cluster_of(request)
    gpu = cluster.gpu
    if gpu.memory_bytes * request.memory_fraction <= gpu.reserved_bytes:
        reserved = f"{gpu.reserved_bytes / gpu.memory_bytes:.3g}"
        raise InputError("--memory-fraction", request.memory_fraction, f"more than {reserved} is expected, the share that {gpu.name} has reserved")
    return cluster


def fixed_of(request: Request) -> Fixed:
    """The decisions that the user has made."""
    return Fixed(**{field.name: getattr(request, field.name) for field in dataclasses.fields(Fixed)})


def training_of(request: Request, model: ModelSpec, default_batch: int | None) -> Training:
    """The training inputs; `default_batch` stands in where no global batch size was given, and None demands one."""
    batch = request.global_batch_size or default_batch
    if batch is None:
        raise InputError("--global-batch-size", None, "it is required here: the samples of one optimizer step")
    if request.program is not None:
        load_software(request.program, "--program")
    return Training(
        global_batch_size=batch,
        sequence_length=sequence_length_of(request, model),
        precision=request.precision,  # type: ignore[arg-type]
        optimizer=request.optimizer,  # type: ignore[arg-type]
        profile=request.profile,  # type: ignore[arg-type]
        program=request.program,
        attention=request.attention or ("fused" if request.profile == "meshwright" else None),  # type: ignore[arg-type]
        memory_fraction=request.memory_fraction,
    )


def inputs_of(request: Request, default_batch: int | None = None) -> Inputs:
    model = model_of(request)
    return Inputs(model=model, cluster=cluster_to_fill(request), training=training_of(request, model, default_batch))
