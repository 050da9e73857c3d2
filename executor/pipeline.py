"""Runs a rank's action list: the list that the planner simulated, on real processes.

A receive waits right before the compute that needs it; a send starts right after the compute that made it. Only the
micro-batches in flight hold memory, and messages that have not been taken (`Sends`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from executor.functions import State
from executor.measure import Recorder
from executor.mesh import DONE, Mesh
from executor.model import StageModel
from executor.transport import irecv, isend
from executor.units import Unit
from planner.schedule import Actions


class Message(NamedTuple):
    """What a stage hands to the next, and gets the gradient of."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Compute(Protocol):
    """What the compute actions do."""

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        """The stage's output for the next stage, None from the last."""

    def backward(self, stage: int, microbatch: int, gradient: torch.Tensor | None, split: bool) -> torch.Tensor | None:
        """The gradient of the stage's input, None from the first. With `split`, weight gradients are put off."""

    def weights(self, stage: int, microbatch: int) -> None:
        """The weight gradients that were put off."""

    def reduce(self, stage: int) -> None:
        """The stage's gradients over the data-parallel ranks."""

    def optimizer(self) -> None:
        """The optimizer's step."""


class StageCompute:
    """The real thing: the stages' forward and backward passes."""

    def __init__(
        self, stages: dict[int, StageModel], last_stage: int, state: State, device: torch.device, optimizer: Callable[[], None]
    ) -> None:
        self.stages = stages
        self.last_stage = last_stage
        self.state = state
        self.device = device
        self.run_optimizer = optimizer
        self.tokens: torch.Tensor | None = None
        """[micro-batches, tokens] of this step, where this rank has the first stage; `targets` where it has the last."""
        self.targets: torch.Tensor | None = None
        self._saved: dict[tuple[int, int], tuple[torch.Tensor, Any]] = {}
        self._deferred: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        model = self.stages[stage]
        tokens = self.tokens[microbatch] if model.has_embedding and self.tokens is not None else None
        targets = self.targets[microbatch] if model.has_head and self.targets is not None else None
        root = torch.zeros((), device=self.device, requires_grad=True) if x is None else x.requires_grad_()
        out = model.forward(root, tokens, targets, self.state)
        self._saved[stage, microbatch] = (root, torch.autograd.graph.get_gradient_edge(out))
        return out.detach() if stage < self.last_stage else None

    def backward(self, stage: int, microbatch: int, gradient: torch.Tensor | None, split: bool) -> torch.Tensor | None:
        root, edge = self._saved.pop((stage, microbatch))
        if split:
            self.state.deferred = self._deferred[stage, microbatch] = []
        torch.autograd.backward((edge,), (gradient if gradient is not None else torch.ones((), device=self.device),))
        self.state.deferred = None
        # put-off weight gradients hold the root, which must not hold its gradient until they run
        gradient, root.grad = root.grad, None
        return gradient if stage > 0 else None

    def weights(self, stage: int, microbatch: int) -> None:
        work = deque(self._deferred.pop((stage, microbatch)))
        with torch.no_grad():
            while work:
                work.popleft()()

    def reduce(self, stage: int) -> None:
        reduce_units(self.stages[stage].units)

    def optimizer(self) -> None:
        self.run_optimizer()


def reduce_units(units: Iterable[Unit]) -> None:
    """The units' gradients over the data-parallel ranks, two at a time: gloo keeps a copy of what it reduces."""
    before: Any = DONE
    for unit in units:
        work = unit.reduce()
        before.wait()
        before = work
    before.wait()


class SleepCompute:
    """A rehearsal: each action takes its predicted time and sends messages of the real size."""

    def __init__(
        self, seconds: Callable[[str, int], float], last_stage: int, messages: Sequence[Message], reduce: Callable[[int], None]
    ) -> None:
        self.seconds = seconds
        self.last_stage = last_stage
        self.messages = messages
        self.run_reduce = reduce

    def _act(self, kind: str, stage: int) -> None:
        until = time.perf_counter() + self.seconds(kind, stage)
        while (rest := until - time.perf_counter()) > 0:
            time.sleep(rest)

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        self._act("F", stage)
        return self._message(stage) if stage < self.last_stage else None

    def backward(self, stage: int, microbatch: int, gradient: torch.Tensor | None, split: bool) -> torch.Tensor | None:
        self._act("I" if split else "B", stage)
        return self._message(stage - 1) if stage > 0 else None

    def _message(self, behind: int) -> torch.Tensor:
        shape, dtype = self.messages[behind]
        return torch.zeros(shape, dtype=dtype)

    def weights(self, stage: int, microbatch: int) -> None:
        self._act("W", stage)

    def reduce(self, stage: int) -> None:
        self.run_reduce(stage)

    def optimizer(self) -> None:
        self._act("OPTIMIZER", -1)


Flow = tuple[str, int]
"""Direction ("F" or "B") and sending stage."""


class Sends:
    """Messages on their way, each with its tensor.

    With `in_turn` (`planner.schedule.IN_TURN_SCHEDULES`) each flow holds its last message until the next one, which waits
    until the last has been taken: so many tensors at any time, however late the others are. Without, a message is let go as
    soon as it has arrived. A gloo message says so only to who waits for it, so a thread waits, one for each flow; NCCL's
    can be asked; a fake one has arrived at once.
    """

    def __init__(self, in_turn: bool) -> None:
        self.in_turn = in_turn
        self.backend = dist.get_backend() if dist.is_initialized() else "none"
        self._last: dict[Flow, tuple[Any, torch.Tensor]] = {}
        self._pending: list[tuple[Any, torch.Tensor]] = []
        self._queues: dict[Flow, queue.SimpleQueue[Any]] = {}
        self._error: BaseException | None = None

    def send(self, flow: Flow, tensor: torch.Tensor, start: Callable[[], Any]) -> None:
        """Starts a message of `tensor`, and keeps the tensor until it is let go."""
        if self.in_turn:
            self._let_go(flow)
            self._last[flow] = (start(), tensor)
            return
        work = start()
        if self.backend == "gloo":
            if flow not in self._queues:
                self._queues[flow] = queue.SimpleQueue()
                threading.Thread(target=self._wait, args=(self._queues[flow],), name=f"sends {flow}", daemon=True).start()
            self._queues[flow].put((work, tensor))
        elif self.backend != "fake":
            self._pending = [item for item in self._pending if not item[0].is_completed()]
            self._pending.append((work, tensor))

    def finish(self) -> None:
        """Waits for all messages. Raises what went wrong with one."""
        for flow in list(self._last):
            self._let_go(flow)
        for work, _ in self._pending:
            work.wait()
        self._pending = []
        for waiting in self._queues.values():
            done = threading.Event()
            waiting.put((done, None))
            done.wait()
        if self._error is not None:
            raise self._error

    def _let_go(self, flow: Flow) -> None:
        work, _ = self._last.pop(flow, (None, None))
        if work is not None:
            work.wait()

    def _wait(self, waiting: queue.SimpleQueue[Any]) -> None:
        while True:
            work, tensor = waiting.get()
            try:
                if tensor is None:
                    work.set()
                else:
                    work.wait()
            except BaseException as error:  # reported by `finish`, in the thread that sends
                self._error = self._error or error
            work = tensor = None


class Pipeline:
    """Runs one step of a rank's actions. `stage_ranks[i]` is the pipeline rank of stage i, `messages[i]` what it hands on.

    `in_turn` as in `Sends`.
    """

    def __init__(
        self,
        actions: Actions,
        stage_ranks: tuple[int, ...],
        mesh: Mesh,
        messages: Sequence[Message],
        device: torch.device,
        recorder: Recorder,
        *,
        in_turn: bool,
    ) -> None:
        self.actions = actions
        self.stage_ranks = stage_ranks
        self.mesh = mesh
        self.messages = messages
        self.device = device
        self.recorder = recorder
        self._inbox: dict[tuple[str, int, int], torch.Tensor] = {}
        self._outbox: dict[tuple[str, int, int], torch.Tensor] = {}
        self._sends = Sends(in_turn)

    def run(self, compute: Compute, around: Callable[[str], Any] | None = None) -> None:
        """All actions in order. `around(kind)` is a context for each, used to categorise memory."""
        recorder, now = self.recorder, self.recorder.now
        for action in self.actions:
            kind, stage, microbatch = action
            start = now()
            if around is None:
                self._do(compute, kind, stage, microbatch)
            else:
                with around(kind):
                    self._do(compute, kind, stage, microbatch)
            recorder.add(kind, stage, microbatch, start, now())
        self._sends.finish()

    def _do(self, compute: Compute, kind: str, stage: int, microbatch: int) -> None:
        if kind == "F":
            out = compute.forward(stage, microbatch, self._inbox.pop(("F", stage, microbatch), None))
            self._hand_on("F", stage + 1, stage, microbatch, out)
        elif kind in "BI":
            gradient = self._inbox.pop(("B", stage, microbatch), None)
            out = compute.backward(stage, microbatch, gradient, kind == "I")
            del gradient
            self._hand_on("B", stage - 1, stage, microbatch, out)
        elif kind == "W":
            compute.weights(stage, microbatch)
        elif kind == "RECV_F":
            self._receive("F", stage - 1, stage, microbatch)
        elif kind == "RECV_B":
            self._receive("B", stage + 1, stage, microbatch)
        elif kind == "SEND_F":
            self._send("F", stage + 1, stage, microbatch)
        elif kind == "SEND_B":
            self._send("B", stage - 1, stage, microbatch)
        elif kind == "REDUCE":
            compute.reduce(stage)
        else:
            self._sends.finish()
            compute.optimizer()

    def _hand_on(self, direction: str, to: int, stage: int, microbatch: int, out: torch.Tensor | None) -> None:
        """Keeps an output for its send, or gives it to the neighbouring stage when that is on this rank."""
        if out is None:
            return
        if self.stage_ranks[to] == self.mesh.pp.index:
            self._inbox[direction, to, microbatch] = out
        else:
            self._outbox[direction, stage, microbatch] = out

    def _channel(self, direction: str, source: int, to: int) -> Any:
        """The group for messages from one stage to another."""
        return self.mesh.channels[direction, self.stage_ranks[source], self.stage_ranks[to]]

    def _tag(self, direction: str, to: int, microbatch: int) -> int:
        return 2 * (microbatch * len(self.stage_ranks) + to) + (direction == "B") if self.mesh.tagged else 0

    def _send(self, direction: str, to: int, stage: int, microbatch: int) -> None:
        tensor = self._outbox.pop((direction, stage, microbatch)).contiguous()
        self.mesh.sent_bytes["pp"] += tensor.nbytes
        group, tag = self._channel(direction, stage, to), self._tag(direction, to, microbatch)
        peer = self.mesh.pp.ranks[self.stage_ranks[to]]
        self._sends.send((direction, stage), tensor, lambda: isend(tensor, peer, group, tag))

    def _receive(self, direction: str, source: int, stage: int, microbatch: int) -> None:
        shape, dtype = self.messages[min(source, stage)]
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        group, tag = self._channel(direction, source, stage), self._tag(direction, stage, microbatch)
        irecv(tensor, self.mesh.pp.ranks[self.stage_ranks[source]], group, tag).wait()
        self._inbox[direction, stage, microbatch] = tensor
