"""Several tasks mixed by weight into one endless stream of sequences that any run can leave and enter again at the very next token.

A task is drawn for each sequence and packs a stream of its own, so the weights are shares of sequences, whatever the documents' lengths.
The draw is a hash of (seed, sequence index): there is no running generator whose state could be lost, and the order of tasks depends on
nothing else. Everything is deterministic in (seed, task list, data) and in nothing of ranks, micro-batches or time.

Left to others: how the list is written (tasks/task_list.py), how documents are read (tasks/readers.py), tokenised (tasks/encoding.py),
packed (tasks/packing.py) and read ahead (tasks/prefetch.py); what the sequences are used for.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from tasks.encoding import Encoder
from tasks.packing import PackedSequence, PackingRules, TaskPacker
from tasks.readers import Documents
from tasks.task_list import TaskSpec
from user_error import UserError

LARGEST_COUNT = 2**63 - 1  # of anything that a state counts
OpenDocuments = Callable[[TaskSpec, int], Documents]  # of a task and its place in the list


def draw_task(seed: int, sequence_index: int, cumulative_weights: Sequence[float]) -> int:
    """The place in the list of the task that this sequence is drawn from: a pure function.

    53 bits of a hash of (seed, index) make a uniform number in [0, 1). It is scaled by the last cumulative weight, and the product stays
    below that one in floating point too: so rounding in the sums does not matter, and a task of weight 0 is never drawn, be it the last.
    """
    digest = hashlib.blake2b(f"{seed}:{sequence_index}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "little") >> 11) / 2**53
    return bisect_right(cumulative_weights, uniform * cumulative_weights[-1])


def counted_by_task(state: Mapping[str, Any], what: str) -> dict[str, int]:
    """From a mixture's state, by the task's name: its "tokens" (padding not counted), "records" or "pass"es since the very first sequence,
    resumes included. A name that stands in the list several times gets its number behind it."""
    counted: dict[str, int] = {}
    for task in state["tasks"]:
        name, number = task["path"], 1
        while name in counted:
            number += 1
            name = f"{task['path']} ({number})"
        counted[name] = int(task.get(what, 0))
    return counted


def _is_state(state: Any) -> bool:
    """True for what has the form of Mixture.state(): of what is read from a file, nothing else is known."""
    if not isinstance(state, dict) or not isinstance(state.get("tasks"), list):
        return False
    numbers = [state.get("next_sequence_index"), state.get("seed")]
    for task in state["tasks"]:
        if not isinstance(task, dict) or not isinstance(task.get("path"), str):
            return False
        numbers += [task.get("num_bytes"), *(value for name, value in task.items() if name != "path")]
    return all(isinstance(number, int) and 0 <= number <= LARGEST_COUNT for number in numbers)


class Mixture:
    """The endless stream of sequences. Used by one thread at a time; close() closes the data files."""

    def __init__(
        self,
        *,
        tasks: Sequence[TaskSpec],
        open_documents: OpenDocuments,
        encoder: Encoder,
        rules: PackingRules,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Opens and checks all data files (see tasks/readers.py for how far). With the `state` of another mixture over the same files,
        seed and way of packing it goes on at that one's next token; weights and seq_length may differ. Raises UserError for bad files and
        for a state that does not fit them.
        """
        if seed < 0:
            raise UserError(f"The data seed must be a non-negative integer, not {seed}. Give another --seed.")
        assert tasks, "a mixture needs at least one task"
        self.tasks = tuple(tasks)
        self._seed = seed
        self._cumulative_weights = list(accumulate(task.weight for task in tasks))
        self.encoder, self._rules = encoder, rules
        self._next_sequence_index = 0
        self._peeked: deque[tuple[PackedSequence, dict[str, Any]]] = deque()  # each with the state in front of it
        self._packers: list[TaskPacker] = []
        self._documents: list[Documents] = []
        try:
            for place, task in enumerate(tasks):
                self._documents.append(open_documents(task, place))
            self.go_to(state)
        except UserError:
            self.close()
            raise

    def go_to(self, state: dict[str, Any] | None) -> None:
        """Go on where the mixture stood that returned ``state``; None: at the beginning. Raises UserError if it does not fit the data."""
        if state is not None:
            self._check_state(state)
        self._peeked.clear()
        self._next_sequence_index = 0 if state is None else int(state["next_sequence_index"])
        self._packers = [
            TaskPacker(
                documents=documents,
                encoder=self.encoder,
                rules=self._rules,
                task=place,
                state=None if state is None else state["tasks"][place],
            )
            for place, documents in enumerate(self._documents)
        ]

    def next_sequence(self) -> PackedSequence:
        """The next sequence; UserError for a bad record met in a file too large to be checked when it was opened."""
        return self._peeked.popleft()[0] if self._peeked else self._draw()

    def peek(self, num: int) -> list[PackedSequence]:
        """The next sequences, which next_sequence() will give all the same."""
        while len(self._peeked) < num:
            state = self._state()
            self._peeked.append((self._draw(), state))
        return [sequence for sequence, _ in self._peeked][:num]

    def state(self) -> dict[str, Any]:
        """JSON-serialisable: where the next token of every task is. A new value each time."""
        return self._peeked[0][1] if self._peeked else self._state()

    @property
    def tokens_per_task(self) -> list[int]:
        """Tokens drawn from each place of the list since the very first sequence, resumes included."""
        return [int(task["tokens"]) for task in self.state()["tasks"]]

    @property
    def task_names(self) -> list[str]:
        """Of each place of the list, as the user wrote it."""
        return [documents.name for documents in self._documents]

    def fingerprints(self) -> list[str]:
        """Hex digits of each place's data, by which a resume knows it again."""
        return [documents.fingerprint() for documents in self._documents]

    def close(self) -> None:
        """Closes the data files; the mixture gives no sequence afterwards."""
        for documents in self._documents:
            documents.close()

    def _draw(self) -> PackedSequence:
        task = draw_task(self._seed, self._next_sequence_index, self._cumulative_weights)
        sequence = self._packers[task].next_sequence()
        self._next_sequence_index += 1
        return sequence

    def _state(self) -> dict[str, Any]:
        return {
            "next_sequence_index": self._next_sequence_index,
            "seed": self._seed,
            "tasks": [
                {"path": documents.name, "num_bytes": documents.num_bytes, **packer.state()}
                for documents, packer in zip(self._documents, self._packers, strict=True)
            ],
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        """A file may have moved, but its place in the list, its size and the seed fix which document a position means."""
        rule = "A run resumes its data position only with the data it was saved with"
        cure = "Give the same --task-name list, files and --seed as that run, or start without the saved data position."
        if not _is_state(state):
            raise UserError(f"{rule}; the saved one is damaged: it does not say where each task stood. {cure}")
        saved = state["tasks"]
        if len(saved) != len(self._documents):
            raise UserError(
                f"{rule}; the saved list of tasks has {len(saved)} places ({', '.join(place['path'] for place in saved)}), "
                f"this one {len(self._documents)} ({', '.join(documents.name for documents in self._documents)}). {cure}"
            )
        if state["seed"] != self._seed:
            raise UserError(f"{rule}; it was saved with seed {state['seed']}, this run has {self._seed}. {cure}")
        for place, (was, documents) in enumerate(zip(saved, self._documents, strict=True), start=1):
            if was["num_bytes"] != documents.num_bytes:
                raise UserError(
                    f"{rule}; place {place} of the list was {was['path']} with {was['num_bytes']} bytes, "
                    f"now it is {documents.name} with {documents.num_bytes}. {cure}"
                )
