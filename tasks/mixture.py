"""Several tasks mixed by weight into one endless stream of sequences that any run can leave and enter again at the very next token.

A task is drawn for each sequence and packs a stream of its own, so the weights are shares of tokens, whatever the documents' lengths.
The draw is a hash of (seed, sequence index): there is no running generator whose state could be lost, and the order of tasks depends on
nothing else. Everything is deterministic in (seed, task list, data) and in nothing of ranks, micro-batches or time.

Left to others: how documents are read (tasks/readers.py), packed (tasks/packing.py) and read ahead (tasks/prefetch.py); which
tokenizer; what the sequences are used for.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tasks.packing import PackedSequence, TaskPacker
from tasks.readers import ENDINGS, open_documents
from tasks.records import OnBadRecord
from user_error import UserError

_LIST_RULE = "The task list must read path[:weight],path[:weight],..., with weights >= 0 of which one at least is above 0"


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of the list: a data file and its share of the tokens (all shares add up to 1; 0 means never drawn)."""

    path: str
    weight: float


def parse_task_list(text: str) -> tuple[TaskSpec, ...]:
    """Reads `a.jsonl:0.2,b.jsonl.zst:0.3,c.jsonl`. A missing weight is 1; weights are normalised to shares. The weight is what stands
    behind the last colon, if that is a number: addresses with ports and paths with colons need no quoting (a path that itself ends
    in a colon and a number needs a weight behind it). A path cannot hold a comma. A weight of 0 keeps a task in the list, where its
    file is opened and checked but never drawn. A file may stand in the list several times; each place reads it in an order of its own.
    Raises UserError.
    """
    places = [_parse_task(item.strip(), text) for item in text.split(",")]
    largest = max(weight for _, weight in places)
    if largest == 0:
        raise UserError(f"{_LIST_RULE}; all weights of {text!r} are 0. Give one task at least a weight above 0.")
    scaled = [weight / largest for _, weight in places]  # so that not even weights near the largest float add up to infinity
    total = math.fsum(scaled)
    return tuple(TaskSpec(path=path, weight=weight / total) for (path, _), weight in zip(places, scaled, strict=True))


def _parse_task(item: str, text: str) -> tuple[str, float]:
    """(path, weight) of one item of the list; `text` is the whole list, for messages."""
    path, weight = item, 1.0
    head, colon, tail = item.rpartition(":")
    if colon:
        try:
            path, weight = head.strip(), float(tail)
        except ValueError as error:
            if head.lower().endswith(ENDINGS) and not tail.lower().endswith(ENDINGS):
                raise UserError(f"{_LIST_RULE}; {tail!r} in {item!r} is not a number. Write a weight such as {head}:0.3") from error
    if not path:
        raise UserError(f"{_LIST_RULE}; an item of {text!r} has no path. Remove the stray comma, or name a file there.")
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{_LIST_RULE}; the weight in {item!r} is {weight:g}. Give a finite number that is not negative.")
    return path, weight


def draw_task(seed: int, sequence_index: int, cumulative_weights: Sequence[float]) -> int:
    """The place in the list of the task that this sequence is drawn from: a pure function.

    53 bits of a hash of (seed, index) make a uniform number in [0, 1). It is scaled by the last cumulative weight, and the product stays
    below that one in floating point too: so rounding in the sums does not matter, and a task of weight 0 is never drawn, be it the last.
    """
    digest = hashlib.blake2b(f"{seed}:{sequence_index}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "little") >> 11) / 2**53
    return bisect_right(cumulative_weights, uniform * cumulative_weights[-1])


class Mixture:
    """The endless stream of sequences. Used by one thread at a time; close() closes the data files."""

    def __init__(
        self,
        *,
        tasks: Sequence[TaskSpec],
        tokenize: Callable[[str], list[int]],
        eos_token_id: int,
        seq_length: int,
        seed: int,
        on_bad_record: OnBadRecord = "error",
        state: dict[str, Any] | None = None,
    ) -> None:
        """Opens and checks all data files (see tasks/readers.py for how far). With the `state` of another mixture over the same files
        and seed it goes on at that one's next token; weights and seq_length may differ. Raises UserError for bad files and for a
        state that does not fit them.
        """
        if seed < 0:
            raise UserError(f"The data seed must be a non-negative integer, not {seed}. Give another --seed.")
        assert tasks, "a mixture needs at least one task"
        self._seed = seed
        self._cumulative_weights = list(accumulate(task.weight for task in tasks))
        self._next_sequence_index = 0 if state is None else int(state["next_sequence_index"])
        self._documents = []
        try:
            for place, task in enumerate(tasks):
                self._documents.append(open_documents(task.path, seed=seed, place=place, on_bad_record=on_bad_record))
            if state is not None:
                self._check_state(state)
        except UserError:
            self.close()
            raise
        self._packers = [
            TaskPacker(
                documents=documents,
                tokenize=tokenize,
                eos_token_id=eos_token_id,
                seq_length=seq_length,
                task=place,
                state=None if state is None else state["tasks"][place],
            )
            for place, documents in enumerate(self._documents)
        ]

    def next_sequence(self) -> PackedSequence:
        """The next sequence; UserError for a bad record met in a file too large to be checked when it was opened."""
        task = draw_task(self._seed, self._next_sequence_index, self._cumulative_weights)
        sequence = self._packers[task].next_sequence()
        self._next_sequence_index += 1
        return sequence

    def state(self) -> dict[str, Any]:
        """JSON-serialisable: where the next token of every task is. A new value each time."""
        return {
            "next_sequence_index": self._next_sequence_index,
            "seed": self._seed,
            "tasks": [
                {"path": documents.name, "num_bytes": documents.num_bytes, **packer.state()}
                for documents, packer in zip(self._documents, self._packers, strict=True)
            ],
        }

    @property
    def tokens_per_task(self) -> list[int]:
        """Tokens drawn from each place of the list since the very first sequence, resumes included."""
        return [packer.num_tokens for packer in self._packers]

    def close(self) -> None:
        """Closes the data files; the mixture gives no sequence afterwards."""
        for documents in self._documents:
            documents.close()

    def _check_state(self, state: dict[str, Any]) -> None:
        """A file may have moved, but its place in the list, its size and the seed fix which document a position means."""
        rule = "A run resumes its data position only with the data it was saved with"
        cure = "Give the same --task-name list, files and --seed as that run, or start without the saved data position."
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
