"""Play the orders of all stages on paper: does anybody wait for ever, how long does a step take, how much is held meanwhile?

Pure. What the engine does with real tensors this does with durations: an action starts when the stage is free and its message is
there; a stage that has weight gradients left over (zb) computes them while it would wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline_parallel.schedule import Action


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds per micro-batch on one stage. backward: all of it that is not weight_grad; orders without W take both in B."""

    forward: float = 1.0
    backward: float = 1.0
    weight_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A link between neighbours, alike in both directions. Seconds; transfers of one direction follow each other."""

    latency: float = 0.0
    transfer: float = 0.0


class Played(NamedTuple):
    """An action and when it ran, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One step. busy: per stage, seconds; peak_in_flight: per stage, micro-batches between F and the last use of their activations;
    played: per stage, what it did and when."""

    makespan: float
    busy: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    played: tuple[tuple[Played, ...], ...]

    @property
    def bubble(self) -> float:
        """Share of stages x makespan in which nothing is computed, 0 .. 1."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


class DeadlockError(Exception):
    """The orders wait for each other for ever. The text names what each unfinished stage waits for."""


def peak_in_flight(actions: Sequence[Action]) -> int:
    """Most micro-batches whose activations a stage holds at once, if it plays ``actions`` as they stand."""
    last_use = "W" if any(action.kind == "W" for action in actions) else "B"
    held = peak = 0
    for action in actions:
        held += (action.kind == "F") - (action.kind == last_use)
        peak = max(peak, held)
    return peak


def simulate(
    orders: Sequence[Sequence[Action]], durations: Sequence[Durations] | None = None, wires: Sequence[Wire] | None = None
) -> Simulation:
    """One step of a pipeline whose stage s plays orders[s]. durations: per stage; wires: per link. Raises DeadlockError."""
    num_stages = len(orders)
    durations = durations or [Durations()] * num_stages
    wires = wires or [Wire()] * (num_stages - 1)
    board = _Board(wires)
    stages = [_SimulatedStage(s, num_stages, orders[s], durations[s], board) for s in range(num_stages)]
    while any(not stage.is_done for stage in stages):
        num_played = sum(stage.advance() for stage in stages)
        if num_played == 0:
            stuck = "; ".join(stage.waits_for for stage in stages if not stage.is_done)
            raise DeadlockError(f"the schedule cannot finish: {stuck}")
    return Simulation(
        makespan=max(stage.now for stage in stages),
        busy=tuple(stage.busy for stage in stages),
        peak_in_flight=tuple(peak_in_flight(actions) for actions in orders),
        played=tuple(tuple(stage.played) for stage in stages),
    )


class _Board:
    """When which message arrives. Key: (receiving stage, kind of the action that needs it, micro-batch)."""

    def __init__(self, wires: Sequence[Wire]) -> None:
        self.arrival: dict[tuple[int, str, int], float] = {}
        self._wires = wires
        self._free: dict[tuple[int, int], float] = {}  # (from, to) -> when that direction is free again

    def send(self, kind: str, i: int, sender: int, receiver: int, now: float) -> None:
        wire = self._wires[min(sender, receiver)]
        start = max(now, self._free.get((sender, receiver), 0.0))
        self._free[sender, receiver] = start + wire.transfer
        self.arrival[receiver, kind, i] = start + wire.transfer + wire.latency


class _SimulatedStage:
    """One stage: a clock, and how far it has come in its order."""

    def __init__(self, s: int, num_stages: int, actions: Sequence[Action], durations: Durations, board: _Board) -> None:
        self._s, self._num_stages, self._actions, self._durations, self._board = s, num_stages, actions, durations, board
        self._defers = any(action.kind == "W" for action in actions)
        self._done_actions = 0
        self._left_over: list[int] = []  # micro-batches whose W is still to do
        self._computed: set[tuple[str, int]] = set()
        self.now = self.busy = 0.0
        self.played: list[Played] = []

    @property
    def is_done(self) -> bool:
        return self._done_actions == len(self._actions)

    @property
    def waits_for(self) -> str:
        kind, i = self._actions[self._done_actions]
        return f"stage {self._s} cannot run {kind}{i}"

    def advance(self) -> int:
        """Play on until a message is missing that nobody has sent yet. Returns how many actions were played."""
        before = self._done_actions
        while not self.is_done:
            kind, i = self._actions[self._done_actions]
            ready = self._ready_at(kind, i)
            if ready is None:
                break
            while ready > self.now and self._left_over:
                self._weight_gradient(self._left_over[0])
            self.now = max(self.now, ready)
            if kind == "W":
                if i in self._left_over:
                    self._weight_gradient(i)
            else:
                self._play(kind, i)
            self._done_actions += 1
        return self._done_actions - before

    def _ready_at(self, kind: str, i: int) -> float | None:
        """When the input of an action is there; None: not known yet."""
        if kind == "F":
            return 0.0 if self._s == 0 else self._board.arrival.get((self._s, "F", i))
        if kind == "W":
            return 0.0 if ("B", i) in self._computed else None
        if ("F", i) not in self._computed:
            return None
        return 0.0 if self._s == self._num_stages - 1 else self._board.arrival.get((self._s, "B", i))

    def _play(self, kind: Literal["F", "B"], i: int) -> None:
        if kind == "F":
            duration, neighbour = self._durations.forward, self._s + 1
        else:
            duration, neighbour = self._durations.backward + (0 if self._defers else self._durations.weight_grad), self._s - 1
            if self._defers:
                self._left_over.append(i)
        self._spend(Action(kind, i), duration)
        self._computed.add((kind, i))
        if 0 <= neighbour < self._num_stages:
            self._board.send(kind, i, self._s, neighbour, self.now)

    def _weight_gradient(self, i: int) -> None:
        self._left_over.remove(i)
        self._spend(Action("W", i), self._durations.weight_grad)

    def _spend(self, action: Action, seconds: float) -> None:
        self.played.append(Played(action, self.now, self.now + seconds))
        self.now += seconds
        self.busy += seconds
