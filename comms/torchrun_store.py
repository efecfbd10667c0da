"""Where rank 0 listens, told through torchrun's own store, which outlives the ranks.

What torchrun tells its workers names no round of theirs that all nodes agree on: TORCHELASTIC_RESTART_COUNT is counted by each node's agent
for itself, a change of membership is not counted at all, and an agent that was started again begins at 0. So a fixed key would either be
looked for under another name on another node, or still hold the address of a rank 0 that is gone. Here nothing is left lying about: every
rank asks under a number of its own, and only a rank 0 that lives answers. Promises: what ask() returns came from a process that was alive
after the question was put. Whether it is a rank 0 of this job, the hub finds out (hub.py)."""

import contextlib
import threading
from collections.abc import Callable

import torch.distributed as dist

LOOK_EVERY_S = 0.2


class TorchrunStore:
    """connect: opens a client of the store, whose time limit is that of get()."""

    def __init__(self, connect: Callable[[], dist.Store]) -> None:
        self._connect = connect

    def set(self, key: str, value: str) -> None:
        """Answer whoever asks for ``key``, from now on until this process ends. Raises dist.DistError if the store cannot be reached."""
        store = self._connect()
        threading.Thread(target=_answer, args=(store, key, value), name=f"answers for {key}", daemon=True).start()

    def get(self, key: str) -> bytes:
        """What a living process answers. Raises dist.DistError if nobody does in time."""
        store = self._connect()
        return store.get(f"{key}/{store.add(f'{key}/asked', 1)}")


def _answer(store: dist.Store, key: str, value: str) -> None:
    """Questions of an earlier round are answered once more, which nobody reads."""
    answered, stop = 0, threading.Event()
    with contextlib.suppress(dist.DistError):  # torchrun is gone, and ends its workers
        while not stop.wait(LOOK_EVERY_S if answered else 0):
            asked = store.add(f"{key}/asked", 0)
            for number in range(answered + 1, asked + 1):
                store.set(f"{key}/{number}", value)
            answered = asked
