"""The integer program in PuLP: where to cut a chain of layers into pipeline stages, and what each layer recomputes.

It knows nothing of transformers. Given are a chain of runs of identical layers, the graph of a schedule's step
(`planner.critical_path`), and for each pipeline rank the moments at which its memory may peak.

    r  run of n_r identical layers          s  stage, on pipeline rank ρ(s)      o  option (recompute level) of a layer
    f, b, i, w   seconds of forward, backward, and of the backward's two halves (input, weights) of one micro-batch
    a  bytes saved per micro-batch in flight, a' deferred   e  bytes of weights, gradients, optimizer   τ  bytes for a moment

Variables, the first two rows integer:

    x[s,r,o]   layers of run r on stage s with option o              u[s,r]   layers of run r on stages 0..s
    y[s,r]     1 if run r ends on stage s or before                  z[s,r,o] 1 if x[s,r,o] > 0
    F[s], B[s], I[s], W[s], R[s]  seconds of the stage               T        seconds of the step

    minimise T subject to

    Σ_o x[s,r,o] = u[s,r] - u[s-1,r],  u[last,r] = n_r                    every layer on one stage      _layers_once
    n_r y[s,r] <= u[s,r] <= n_r y[s,r-1]                                  runs follow one another       _runs_in_order
    Σ_{r,o} x[s,r,o] >= 1                                                 no stage is empty             _no_empty_stage
      or, where sizes are restricted to patterns k, = Σ_k size[k,s] π[k], Σ π[k] = 1, π binary          _one_pattern
    F[s] = Σ f[r,o] x[s,r,o]  (B, I, W alike)                             seconds of a stage            _stage_seconds
    Σ_c λ[rank,c] = 1, λ binary, x[s,r,o] = Σ_c count[c,s,o] λ[rank,c]    where a rank's choices c are
        listed (`planner.choices`): it takes one of them, and needs no rows for memory                  _one_choice
    Σ_{s on the rank, r, o} (seconds of o - of the fastest) x[s,r,o] >= what its memory forces, in whole layers      _forced
    R[s] >= g Σ parameters_r x[s,r,o] + g' for each piece (g, g')          its reduction                 _reduce_seconds
    Σ_{s on the rank} Σ (e_r + k_s a[r,o] + l_s a'[r,o]) x[s,r,o] + τ[s*,d] <= limit    at each moment   _memory
        of each rank that can be its peak: k_s micro-batches of stage s saved, l_s deferred (their weight gradients are
        to be done) while stage s* goes in direction d
    τ[s,d] >= τ[r,o,d] z[s,r,o] - Σ (given back) x[s,r',o'] of what lies above (r,o) on the stage, where z[s,r,o] = 1,
    x[s,r,o] <= n_r z[s,r,o]                                              the fullest layer counts      _transients
    T >= Σ_s (N_F F[s] + N_B B[s] + ...) + messages + reduction + optimizer
        for each path through the schedule's graph, N its counts          fill, steady state, drain     _path
    T <= cutoff                                                           better than what is known     lower_cutoff

Where runs have one layer each, edges (a, b) between them may cost by the cut: c[s,a,b] = u[s,a] - u[s,b] is 1 where
the edge crosses the boundary after stage s, and out[s] (in[s]) 1 where it leaves (enters) stage s. A message takes
Σ message c[s,a,b] longer, F[s] grows by Σ leaving out[s] + entering in[s], and the stage keeps Σ kept out[s] bytes of
each micro-batch                                                                                     _crossing, _leaves, _enters

Paths and moments of memory are rows that are added one by one; `planner.solver` says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from planner.critical_path import Graph, Key, Path, path_seconds
from planner.errors import SolverError
from planner.pipeline import Choice, Edge, Moment, Pipeline, moment_bytes, stage_loads

TOLERANCE = 1e-6
"""Relative gap below which a plan counts as proven optimal; it is the solver's own feasibility tolerance."""
TIE_BREAK = 1e-7
"""Share of the step that the seconds of all stages weigh in the objective, so that of equal steps the one with the least
recomputation is found; bounds are lowered by as much."""
MOMENTS_AT_ONCE = 5
"""Violated moments of a rank that are added to a program before it is solved again."""
_SCALE = 1e4  # seconds and bytes are scaled so that their reference is this, far above the solver's absolute tolerances


class Outcome(NamedTuple):
    values: list[list[list[float]]] | None
    bound: float
    infeasible: bool


class Program:
    """The program in PuLP, and the rows that are added to it."""

    def __init__(self, pipeline: Pipeline, cutoff: float, solver: str | None) -> None:
        import pulp  # type: ignore[import-untyped]

        self.pulp, self.pipeline = pulp, pipeline
        self.solver = _choose(pulp, solver)
        self.known_paths: dict[Path, None] = {}
        self.known_moments: set[Moment] = set()
        self.num_programs = 0
        self.gap = 0.0
        """Relative gap to which integer programs are solved."""
        self.second = _SCALE / (cutoff if cutoff < math.inf else _typical_seconds(pipeline))
        self.problem = pulp.LpProblem("pipeline", pulp.LpMinimize)
        self.step = self.problem.add_variable("T", 0, _SCALE if cutoff < math.inf else None)
        self.x = [
            [
                [self.problem.add_variable(f"x_{s}_{r}_{o}", 0, most, self._whole(s)) for o in range(len(run.options))] if most else []
                for r, (run, most) in enumerate(zip(pipeline.runs, _most_layers(pipeline, s), strict=True))
            ]
            for s in range(pipeline.num_stages)
        ]
        self._layers_once()
        self._runs_in_order()
        if pipeline.patterns:
            self._one_pattern()
        else:
            self._no_empty_stage()
        self._one_choice()
        self._forced()
        self.seconds = self._stage_seconds()
        total = _SCALE * TIE_BREAK / (self.second * _typical_seconds(pipeline))
        self.problem.setObjective(pulp.LpAffineExpression([(self.step, 1.0), *((stage, total) for stage in self.seconds.values())]))
        self.transients: dict[tuple[int, str], Any] = {}
        for rank in sorted(set(pipeline.ranks)):
            fullest = max((moment for moment in pipeline.moments if moment.rank == rank), key=_weight, default=None)
            if fullest is not None and not self._choices(rank):
                self._memory(fullest)

    def _choices(self, rank: int) -> tuple[Choice, ...]:
        return self.pipeline.choices[rank] if self.pipeline.choices else ()

    def _whole(self, stage: int) -> str:
        """Where a rank takes one of its choices, x follows from them."""
        return "Continuous" if self._choices(self.pipeline.ranks[stage]) else "Integer"

    def _add(self, terms: list[tuple[Any, float]], sense: int, right: float) -> None:
        if self.pipeline.edges:  # a variable may stand in several terms
            sums: dict[str, tuple[Any, float]] = {}
            for variable, value in terms:
                sums[variable.name] = (variable, value + (sums[variable.name][1] if variable.name in sums else 0.0))
            terms = list(sums.values())
        expression = self.pulp.LpAffineExpression([(variable, value) for variable, value in terms if value])
        self.problem.addConstraint(self.pulp.LpConstraint(expression, sense, rhs=right))

    def _layers_once(self) -> None:
        """Every layer on one stage; u only for runs whose end may lie on several stages."""
        open_ends = {r for r, cuts in enumerate(_open_cuts(self.pipeline)) for _ in cuts}
        counted = open_ends | {r + 1 for r in open_ends}
        self.u: dict[tuple[int, int], Any] = {}
        for r, run in enumerate(self.pipeline.runs):
            if r not in counted:
                self._add([(x, 1.0) for rows in self.x for x in rows[r]], 0, float(run.length))
                continue
            for s, rows in enumerate(self.x):
                least = run.length if s == self.pipeline.num_stages - 1 else 0
                self.u[s, r] = self.problem.add_variable(f"u_{s}_{r}", least, run.length, "Integer")
                before = [(self.u[s - 1, r], 1.0)] if s else []
                self._add([(x, 1.0) for x in rows[r]] + [(self.u[s, r], -1.0), *before], 0, 0.0)

    def _runs_in_order(self) -> None:
        for r, cuts in enumerate(_open_cuts(self.pipeline)):
            for s in cuts:
                length, following = self.pipeline.runs[r].length, self.pipeline.runs[r + 1].length
                done = self.u[s, r] if length == 1 else self.problem.add_variable(f"y_{s}_{r}", 0, 1, "Integer")
                if length > 1:
                    self._add([(done, float(length)), (self.u[s, r], -1.0)], -1, 0.0)
                self._add([(self.u[s, r + 1], 1.0), (done, -float(following))], -1, 0.0)

    def _no_empty_stage(self) -> None:
        for rows in self.x:
            self._add([(x, 1.0) for row in rows for x in row], 1, 1.0)

    def _one_pattern(self) -> None:
        patterns = self.pipeline.patterns
        chosen = [self.problem.add_variable(f"pattern_{k}", 0, 1, "Integer") for k in range(len(patterns))]
        self._add([(variable, 1.0) for variable in chosen], 0, 1.0)
        for s, rows in enumerate(self.x):
            sizes = [(variable, -float(pattern[s])) for variable, pattern in zip(chosen, patterns, strict=True)]
            self._add([(x, 1.0) for row in rows for x in row] + sizes, 0, 0.0)

    def _one_choice(self) -> None:
        """Each rank whose choices are listed takes one of them; all of them fit, so that it needs no rows for memory."""
        several = next((r for r, run in enumerate(self.pipeline.runs) if len(run.options) > 1), 0)
        for rank in sorted(set(self.pipeline.ranks)):
            choices = self._choices(rank)
            if not choices:
                continue
            taken = [self.problem.add_variable(f"choice_{rank}_{k}", 0, 1, "Integer") for k in range(len(choices))]
            self._add([(variable, 1.0) for variable in taken], 0, 1.0)
            for index, stage in enumerate(s for s, owner in enumerate(self.pipeline.ranks) if owner == rank):
                for o, x in enumerate(self.x[stage][several]):
                    counts = [(variable, -float(choice[index][o])) for variable, choice in zip(taken, choices, strict=True)]
                    self._add([(x, 1.0), *counts], 0, 0.0)

    def _forced(self) -> None:
        """What memory makes each rank recompute: implied by `_memory` and whole layers, but not by fractions of them."""
        pipeline = self.pipeline
        for rank, least in enumerate(pipeline.forced):
            if least and not self._choices(rank):
                terms = [
                    (x, sum(option.seconds(kind) - run.options[0].seconds(kind) for kind in pipeline.kinds) / least)
                    for s, owner in enumerate(pipeline.ranks)
                    if owner == rank
                    for run, row in zip(pipeline.runs, self.x[s], strict=True)
                    for option, x in zip(run.options, row, strict=False)
                ]
                self._add(terms, 1, 1.0 - 1e-9)

    def _done(self, stage: int, run: int) -> list[tuple[Any, float]]:
        """Whether a run of one layer lies on this stage or before."""
        if (stage, run) in self.u:
            return [(self.u[stage, run], 1.0)]
        return [(x, 1.0) for rows in self.x[: stage + 1] for x in rows[run]]

    def _crossing(self, stage: int, edge: Edge) -> list[tuple[Any, float]]:
        """c of the boundary after a stage, which is 0 after the last one and before the first."""
        if not 0 <= stage < self.pipeline.num_stages - 1:
            return []
        return self._done(stage, edge.source) + [(variable, -value) for variable, value in self._done(stage, edge.target)]

    def _leaves(self, stage: int, edge: Edge) -> list[tuple[Any, float]]:
        if edge.target == edge.source + 1:
            return self._crossing(stage, edge)
        return self._apart(stage, edge.source, edge.target)

    def _enters(self, stage: int, edge: Edge) -> list[tuple[Any, float]]:
        if edge.target == edge.source + 1:
            return self._crossing(stage - 1, edge)
        return self._apart(stage, edge.target, edge.source)

    def _apart(self, stage: int, here: int, elsewhere: int) -> list[tuple[Any, float]]:
        """1 where the first layer is on the stage and the other is not."""
        mine, other = [(x, 1.0) for x in self.x[stage][here]], [(x, -1.0) for x in self.x[stage][elsewhere]]
        if not mine or not other:
            return mine
        apart = self.problem.add_variable(f"d_{stage}_{here}_{elsewhere}", 0, 1)
        self._add([*mine, *other, (apart, -1.0)], -1, 0.0)
        return [(apart, 1.0)]

    def _edge_seconds(self, stage: int) -> list[tuple[Any, float]]:
        """What edges add to a stage's forward pass."""
        return [
            (variable, value * seconds * self.second)
            for edge in self.pipeline.edges
            for seconds, use in ((edge.leaving, self._leaves), (edge.entering, self._enters))
            if seconds
            for variable, value in use(stage, edge)
        ]

    def _stage_seconds(self) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        for s, rows in enumerate(self.x):
            for kind in self.pipeline.kinds:
                found[kind, s] = self.problem.add_variable(f"{kind}_{s}", 0)
                terms = [
                    (x, option.seconds(kind) * self.second)
                    for run, row in zip(self.pipeline.runs, rows, strict=True)
                    for option, x in zip(run.options, row, strict=False)
                ]
                more = self._edge_seconds(s) if kind == "F" else []
                self._add([*terms, *more, (found[kind, s], -1.0)], 0, 0.0)
        return found

    def _memory(self, moment: Moment) -> None:
        self.known_moments.add(moment)
        limit, byte = self.pipeline.limits[moment.rank], self._byte(moment.rank)
        terms = [
            (x, (run.states + saved * option.saved + deferred * option.deferred) * byte)
            for stage, saved, deferred in moment.in_flight
            for run, row in zip(self.pipeline.runs, self.x[stage], strict=True)
            for option, x in zip(run.options, row, strict=False)
        ]
        for stage, saved, _ in moment.in_flight:
            for edge in self.pipeline.edges:
                if edge.kept:
                    terms += [(variable, value * saved * edge.kept * byte) for variable, value in self._leaves(stage, edge)]
        self._add([*terms, (self._transient(moment.stage, moment.direction), 1.0)], -1, limit * byte)

    def _byte(self, rank: int) -> float:
        return _SCALE / max(abs(self.pipeline.limits[rank]), 1.0)

    def _transient(self, stage: int, direction: str) -> Any:
        known = (stage, direction) in self.transients  # a variable is no truth value
        return self.transients[stage, direction] if known else self._transients(stage, direction)

    def _transients(self, stage: int, direction: str) -> Any:
        """τ of a stage in one direction: of the layer at which it is largest, when those above it have given back what they can."""
        name = f"{stage}_{direction}"
        tau = self.transients[stage, direction] = self.problem.add_variable(f"tau_{name}", 0)
        byte = self._byte(self.pipeline.ranks[stage])
        above: list[tuple[Any, float]] = []  # what the layers above give back
        more = 0.0  # at most, where they then have more than before
        for r, run in reversed(list(enumerate(self.pipeline.runs))):
            for o, (option, x) in enumerate(zip(run.options, self.x[stage][r], strict=False)):
                need, each = option.transient(direction) * byte, option.given_back(direction) * byte
                terms, used = list(above), x
                if x.upBound > 1:
                    terms.append((x, min(each, 0.0)))  # counted at the lowest of them, where they have more
                    need += min(each, 0.0)
                    if need + more > 0:
                        used = self.problem.add_variable(f"z_{name}_{r}_{o}", 0, 1, "Integer")
                        self._add([(x, 1.0), (used, -float(x.upBound))], -1, 0.0)
                if need + more > 0:
                    self._add([(tau, 1.0), *terms, (used, -(need + more))], 1, -more)
                elif any(value < 0 for _, value in terms):
                    self._add([(tau, 1.0), *terms], 1, need)
                above.append((x, each))
                more += max(-each, 0.0) * x.upBound
        return tau

    def add_path(self, path: Path) -> bool:
        """Adds a path unless it is known; says whether it was new."""
        if path in self.known_paths:
            return False
        self.known_paths[path] = None
        self._path(path)
        return True

    def add_paths(self, paths: Iterable[Path]) -> int:
        return sum(self.add_path(path) for path in paths)

    def separate(self, graph: Graph, seconds: Mapping[Key, float], middle: Mapping[Key, float] | None, bound: float) -> bool:
        """Adds critical paths of the relaxation's stages, and of those halfway to known stages; True if none are new.

        Halfway, because the stages of a relaxation with few paths are extreme, and their critical paths cut off little
        (in-out separation, Ben-Ameur and Neto 2007).
        """
        length, critical = graph.critical_paths(seconds)
        if bound >= length * (1 - TOLERANCE):
            return True
        added = self.add_paths(critical)
        if middle:
            for share in (0.5, 0.15):
                between = {key: share * seconds.get(key, 0.0) + (1 - share) * middle.get(key, 0.0) for key in {**seconds, **middle}}
                added += self.add_paths(graph.critical_paths(between)[1])
        return added == 0

    def _path(self, path: Path) -> None:
        pipeline = self.pipeline
        constant = path_seconds(path, pipeline.fixed_seconds) * self.second
        terms: list[tuple[Any, float]] = [(self.step, 1.0)]
        for (kind, place), count in path:
            if kind == "OPTIMIZER":
                stages = [s for s, rank in enumerate(pipeline.ranks) if rank == place]
                terms += self._parameters(stages, -count * pipeline.optimizer_piece.slope)
                constant += count * pipeline.optimizer_piece.intercept * self.second
            elif kind == "REDUCE" and pipeline.reduce_pieces:
                known = (kind, place) in self.seconds
                terms.append((self.seconds[kind, place] if known else self._reduce_seconds(place), -float(count)))
            elif (kind, place) in self.seconds:
                terms.append((self.seconds[kind, place], -float(count)))
            elif kind in ("SEND_F", "SEND_B"):
                after = place if kind == "SEND_F" else place - 1
                each = -count * self.second * pipeline.slow(after)
                for edge in pipeline.edges:
                    terms += [(variable, value * edge.message * each) for variable, value in self._crossing(after, edge)]
        self._add(terms, 1, constant)

    def _parameters(self, stages: Iterable[int], seconds_each: float) -> list[tuple[Any, float]]:
        return [
            (x, run.parameters * seconds_each * self.second)
            for s in stages
            for run, row in zip(self.pipeline.runs, self.x[s], strict=True)
            for x in row
        ]

    def _reduce_seconds(self, stage: int) -> Any:
        found = self.seconds["REDUCE", stage] = self.problem.add_variable(f"R_{stage}", 0)
        for piece in self.pipeline.reduce_pieces:
            self._add([(found, 1.0), *self._parameters([stage], -piece.slope)], 1, piece.intercept * self.second)
        return found

    def add_violated_moments(self, counts: Sequence[Sequence[Sequence[float]]]) -> int:
        """Adds the fullest violated moments of each rank; says how many there were."""
        violated: dict[int, list[tuple[float, Moment]]] = {}
        loads = stage_loads(self.pipeline, counts)
        for moment in self.pipeline.moments:
            over = moment_bytes(moment, loads) - self.pipeline.limits[moment.rank]
            if over > 1e-9 * abs(self.pipeline.limits[moment.rank]) and moment not in self.known_moments:
                violated.setdefault(moment.rank, []).append((over, moment))
        worst = [moment for rank in sorted(violated) for _, moment in sorted(violated[rank], reverse=True)[:MOMENTS_AT_ONCE]]
        for moment in worst:
            self._memory(moment)
        return len(worst)

    def lower_cutoff(self, seconds: float) -> None:
        self.step.upBound = seconds * self.second

    def run(self, integer: bool, time_limit: float | None) -> Outcome:
        """Solves what has been written down so far. Raises SolverError when the solver fails."""
        pulp = self.pulp
        self.num_programs += 1
        options: dict[str, Any] = {"msg": False, "mip": integer, "gapRel": self.gap, "threads": 1}
        if time_limit is not None:
            options["timeLimit"] = max(time_limit, 0.01)
        try:
            self.problem.solve(_SOLVERS[self.solver](pulp, gapAbs=TOLERANCE * (_SCALE / 10 if self.pipeline.patterns else 1.0), **options))
        except (pulp.PulpError, OSError, RuntimeError, ValueError) as error:
            raise SolverError(f"{self.solver} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
        status, detail = self.problem.status, self.problem.sol_status
        if status == pulp.LpStatusInfeasible:
            return Outcome(None, math.inf, True)
        if status != pulp.LpStatusOptimal or self.step.varValue is None:
            return Outcome(None, self._dual_bound(integer, False), False)
        proven = detail == pulp.LpSolutionOptimal
        values = [
            [[x.varValue or 0.0 for x in row] or [0.0] * len(run.options) for run, row in zip(self.pipeline.runs, rows, strict=True)]
            for rows in self.x
        ]
        return Outcome(values, self._dual_bound(integer, proven), False)

    def _dual_bound(self, integer: bool, proven: bool) -> float:
        """Seconds that the solver has proven no solution to beat."""
        if self.solver == "HiGHS" and integer:
            bound = float(self.problem.solverModel.getInfo().mip_dual_bound)
        else:
            bound = float(self.problem.objective.value()) if proven else -math.inf
        return max(0.0, bound - _SCALE * TIE_BREAK) / self.second if math.isfinite(bound) else 0.0


def _most_layers(pipeline: Pipeline, stage: int) -> list[int]:
    """Layers of each run that a stage can hold at most, since each stage before and after it has at least one layer."""
    first, last = stage, pipeline.num_layers - pipeline.num_stages + stage
    if pipeline.patterns:
        first = min(sum(pattern[:stage]) for pattern in pipeline.patterns)
        last = max(sum(pattern[: stage + 1]) for pattern in pipeline.patterns) - 1
    largest = max((pattern[stage] for pattern in pipeline.patterns), default=pipeline.num_layers)
    found, start = [], 0
    for run in pipeline.runs:
        found.append(min(largest, max(0, min(last, start + run.length - 1) - max(first, start) + 1)))
        start += run.length
    return found


def _open_cuts(pipeline: Pipeline) -> list[list[int]]:
    """For each run but the last, the stages after which its end may or may not have been reached."""
    found, end, slack = [], 0, pipeline.num_layers - pipeline.num_stages
    for run in pipeline.runs[:-1]:
        end += run.length
        found.append([stage for stage in range(pipeline.num_stages - 1) if stage + 1 < end < slack + stage + 1])
    return found


def _weight(moment: Moment) -> tuple[int, bool, int]:
    """Orders the moments of a rank by the micro-batches in flight."""
    return sum(saved + deferred for _, saved, deferred in moment.in_flight), moment.direction != "F", -moment.stage


def _typical_seconds(pipeline: Pipeline) -> float:
    """A number of the order of a micro-batch's seconds through the whole chain."""
    total = sum(run.length * max(sum(option.seconds(kind) for kind in pipeline.kinds) for option in run.options) for run in pipeline.runs)
    return total if total > 0 else 1.0


def _highs(pulp: Any, **options: Any) -> Any:
    return pulp.HiGHS(**options)


def _cbc(pulp: Any, **options: Any) -> Any:
    """CBC from PuLP's own wheel where it brings one, else from the search path."""
    return pulp.COIN_CMD(path=getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", "cbc"), **options)


_SOLVERS: dict[str, Callable[..., Any]] = {"HiGHS": _highs, "CBC": _cbc}


def _choose(pulp: Any, name: str | None) -> str:
    """HiGHS where it is installed, CBC where it is not."""
    if name is not None and name not in _SOLVERS:
        raise SolverError(f"unknown solver {name}: {' or '.join(_SOLVERS)} is expected")
    for candidate in [name] if name else _SOLVERS:
        try:
            if _SOLVERS[candidate](pulp, msg=False).available():
                return candidate
        except (pulp.PulpError, AttributeError, OSError):
            continue
    missing = f"{name} is not" if name else "neither HiGHS nor CBC is"
    raise SolverError(f"{missing} installed; `pip install highspy` installs HiGHS")
