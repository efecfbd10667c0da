"""Greedy generation by the stages of a running pipeline, each with the keys and values of its own layers.

A token must come out behind the last stage before the next one can go into the first, so a single group of sequences would keep one stage
busy and let the others wait. As many groups are therefore under way as there are stages, one in each slot::

    stage 0   g0 g1 | g0 g1 | g0 g1        visits go round the slots; a slot whose group is through takes the next group
    stage 1      g0   g1   g0   g1         tokens go back from the last stage to the first

All stages visit the slots in the same order and assign the same groups to them, without a word: lengths are shared once, and what nobody
can know beforehand, that all of a group ended early, is said in a message of the shape that was awaited from it. A receive is posted as
soon as it is known, one visit of every slot before it is needed.

Promises: everything put has been taken when ``generate`` returns, so that the messages of a training step may follow; no gradient, no
random number, no state but the caches, which are gone then. Left to others: text, replicas (training/).

Legend: B sequences of a group, T columns that are computed at once (the prompts', then 1), C width, S stages.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from comms.groups import Groups
from comms.links import MessageStream
from comms.place import Place
from comms.spans import Spans
from comms.transport import make_transport
from modules.kv_cache import KeyValueCache
from modules.stage import Stage
from user_error import UserError

COLUMN_MULTIPLE = 8  # prompts are padded to one: kernels are compiled by shape (modules/gemm.py)
HEADER_BYTES = 8  # behind the hidden states; the first byte: whether the group has ended


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation of one prompt. ids: without the end token. ended: by it, not by the limit. margin: smallest difference of the two
    best logits over its steps; near 0 where other kernels, precisions or cuts may choose another token."""

    ids: list[int]
    ended: bool
    margin: float


@dataclass(kw_only=True)
class _Group:
    """Sequences that grow together. On the first stage alone: ids, what is computed next (B, T), and ended, by sequence."""

    numbers: list[int]  # of their prompts
    num_columns: int  # of the prompts, pads included
    cache: KeyValueCache
    visits: int = 0
    ids: Tensor | None = None
    ended: list[bool] = field(default_factory=list)


@dataclass
class _Slot:
    """awaiting: on the first stage, the group whose tokens are under way; it may be through, and another one in its place."""

    group: _Group | None = None
    awaiting: _Group | None = None


@dataclass(kw_only=True)
class _Call:
    """What one generate() is about. prompts and answers: on the first stage."""

    prompts: Sequence[Sequence[int]] | None
    lengths: list[int]
    max_new_tokens: int
    eos_token_id: int
    waiting: deque[list[int]]  # groups without a slot yet, as numbers of prompts
    progress: Callable[[int], object]
    answers: list[list[int]]
    has_ended: list[bool]
    margins: list[float]


class Decoder:
    """One stage's part of the generation. Called by all ranks of a pipeline alike."""

    def __init__(
        self,
        *,
        place: Place,
        groups: Groups,
        closing_group: dist.ProcessGroup | None,
        stage: Stage,
        spans: Spans,
        peer_names: list[str],
        batch_size: int,
    ) -> None:
        """closing_group: of comms.groups.make_closing_group. peer_names: of every rank, for messages. batch_size: sequences per pipeline
        that are under way at once; their keys and values are what generating takes beside the weights."""
        assert batch_size >= 1, "at least one sequence at a time"
        self._stage, self._spans, self._batch_size = stage, spans, batch_size
        self._num_stages = place.pp_size
        self._device = next(stage.parameters()).device
        first = place.rank - place.pp

        def stream(group: dist.ProcessGroup | None, peer: int) -> MessageStream | None:
            if group is None:
                return None
            return MessageStream(make_transport(send_group=group, recv_group=group, peer=peer, device=self._device), peer_names[peer])

        self._previous = stream(None if groups.to_previous is None else groups.to_previous.activations, place.rank - 1)
        self._following = stream(None if groups.to_next is None else groups.to_next.activations, place.rank + 1)
        other_end = first if place.is_last_stage else first + place.pp_size - 1
        self._closing = stream(closing_group, other_end) if place.is_first_stage or place.is_last_stage else None
        self._found: deque[Tensor] = deque()  # of a pipeline of one stage: tokens that need not travel

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | None,
        *,
        max_new_tokens: int,
        eos_token_id: int,
        progress: Callable[[int], object] = lambda num_tokens: None,
    ) -> list[Generated] | None:
        """Collective over the ranks of a pipeline. prompts: ids, on the first stage; None elsewhere. The numbers are alike on all.
        progress: hears of tokens that are done, max_new_tokens for every prompt, also where it ends before.

        Returns on the first stage the continuations in the order of the prompts, elsewhere None. Equally probable tokens: the smallest id.
        Raises UserError on the first stage, before anything is sent, for a prompt that cannot be continued; PeerLost."""
        assert max_new_tokens >= 1, "there is something to generate"
        assert (prompts is not None) == self._stage.has_embeddings, "prompts are given to the first stage, and only to it"
        self._check(prompts or (), max_new_tokens)
        lengths = self._share_lengths(prompts)
        groups = groups_of(lengths, self._batch_size, self._num_stages)
        call = _Call(
            prompts=prompts,
            lengths=lengths,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            waiting=deque(groups),
            progress=progress,
            answers=[[] for _ in lengths],
            has_ended=[False] * len(lengths),
            margins=[math.inf] * len(lengths),
        )
        slots = [_Slot() for _ in range(min(self._num_stages, self._batch_size, len(groups)))]
        for slot in slots:
            self._assign(call, slot)
        while any(slot.group or slot.awaiting for slot in slots):
            for slot in slots:
                self._visit(call, slot)
        with self._spans.span("waiting for sends"):
            for stream in (self._following, self._closing):
                if stream is not None:
                    stream.flush()
        if prompts is None:
            return None
        found = zip(call.answers, call.has_ended, call.margins, strict=True)
        return [Generated(ids=ids, ended=ended, margin=margin) for ids, ended, margin in found]

    def close(self) -> None:
        """Nothing more will be generated."""
        for stream in (self._previous, self._following, self._closing):
            if stream is not None:
                stream.close()

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        num_positions, num_ids = self._stage.config.num_positions, self._stage.config.vocab_size
        for number, prompt in enumerate(prompts):
            where = f"prompt {number} (counted from 0)"
            if not prompt:
                raise UserError(f"a prompt must have at least one token, and {where} has none. Leave it out")
            if len(prompt) + max_new_tokens > num_positions:
                raise UserError(
                    f"a prompt and what is generated must fit into the model's {num_positions} positions; {where} has {len(prompt)} "
                    f"tokens, and {max_new_tokens} more are asked for. Shorten the prompt, or ask for fewer "
                    "(--max-new-tokens; in a training --evaluation-max-new-tokens)"
                )
            if not 0 <= min(prompt) <= max(prompt) < num_ids:
                raise UserError(
                    f"the ids of a prompt must be 0 .. {num_ids - 1}; those of {where} are {min(prompt)} .. {max(prompt)}. Use the "
                    "tokenizer that belongs to the model"
                )

    def _share_lengths(self, prompts: Sequence[Sequence[int]] | None) -> list[int]:
        """The number of tokens of every prompt, from the first stage on to all."""
        lengths = [] if prompts is None else [len(prompt) for prompt in prompts]
        with self._spans.span("sharing the lengths of prompts"):
            if self._previous is not None:
                self._previous.post(8)
                count = int(self._previous.take().view(torch.int64))
                self._previous.post(8 * (count + 1))
                lengths = self._previous.take().view(torch.int64).tolist()[1:]
            if self._following is not None:
                self._following.put(torch.tensor([len(lengths)], device=self._device))
                self._following.put(torch.tensor([len(lengths), *lengths], device=self._device))
        return lengths

    def _assign(self, call: _Call, slot: _Slot) -> None:
        """Give ``slot`` the next group, on all stages at the same point of their visits, and ask for its first message."""
        slot.group = None
        if not call.waiting:
            return
        numbers = call.waiting.popleft()
        lengths = [call.lengths[number] for number in numbers]
        num_columns = math.ceil(max(lengths) / COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        pads = [num_columns - length for length in lengths]
        cache = self._stage.empty_cache(pads, num_columns + call.max_new_tokens - 1)
        slot.group = _Group(numbers=numbers, num_columns=num_columns, cache=cache, ended=[False] * len(numbers))
        if call.prompts is not None:
            rows = [[0] * pad + list(call.prompts[number]) for pad, number in zip(pads, numbers, strict=True)]
            slot.group.ids = torch.tensor(rows, dtype=torch.int64, device=self._device)  # (B, T)
        self._post(slot.group)

    def _shape(self, group: _Group) -> tuple[int, int, int]:
        """(B, T, C) of the group's next message."""
        return len(group.numbers), 1 if group.visits else group.num_columns, self._stage.config.width

    def _post(self, group: _Group) -> None:
        if self._previous is not None:
            self._previous.post(math.prod(self._shape(group)) * self._stage.compute_dtype.itemsize + HEADER_BYTES)

    def _visit(self, call: _Call, slot: _Slot) -> None:
        """One turn of a slot: its group's next columns through this stage, or word that the group has ended."""
        if slot.awaiting is not None:
            self._collect(call, slot.awaiting)
            slot.awaiting = None
        group = slot.group
        if group is None:
            return
        x = self._next_input(group)  # (B, T) or (B, T, C)
        if x is None:
            if self._following is not None:
                empty = torch.zeros(self._shape(group), dtype=self._stage.compute_dtype, device=self._device)
                self._send(empty, has_ended=True)
            call.progress((call.max_new_tokens - group.visits) * len(group.numbers))
            self._assign(call, slot)
            return
        with self._spans.span("forward"):
            y = self._stage.extend(x, group.cache)  # (B, T, C)
        if self._following is not None:
            self._send(y, has_ended=False)
        else:
            self._choose(y[:, -1])
        group.visits += 1
        call.progress(len(group.numbers))
        if self._previous is None:
            slot.awaiting = group
            if self._closing is not None:
                self._closing.post(16 * len(group.numbers))
        if group.visits == call.max_new_tokens:
            self._assign(call, slot)
        else:
            self._post(group)

    def _next_input(self, group: _Group) -> Tensor | None:
        """What this stage computes with; None where all sequences of the group have ended."""
        if self._previous is None:
            return None if all(group.ended) else group.ids  # (B, T)
        with self._spans.span("receiving activations"):
            message = self._previous.take()
        if message[-HEADER_BYTES].item():
            return None
        return message[:-HEADER_BYTES].view(self._stage.compute_dtype).view(self._shape(group))  # (B, T, C)

    def _send(self, y: Tensor, *, has_ended: bool) -> None:
        assert self._following is not None, "the last stage sends no hidden states"
        header = torch.full((HEADER_BYTES,), has_ended, dtype=torch.uint8, device=self._device)
        with self._spans.span("sending activations"):
            self._following.put(torch.cat((y.contiguous().view(-1).view(torch.uint8), header)))

    def _choose(self, hidden: Tensor) -> None:
        """hidden (B, C): the last stage's newest. Tokens and margins travel as float64, which holds every id."""
        with self._spans.span("choosing tokens"):
            ids, margins = self._stage.next_tokens(hidden)
            found = torch.stack((ids.double(), margins.double()))  # (2, B)
        if self._closing is None:
            self._found.append(found)
        else:
            with self._spans.span("sending tokens"):
                self._closing.put(found)

    def _collect(self, call: _Call, group: _Group) -> None:
        """On the first stage: what came out of the group's last visit."""
        if self._closing is None:
            found = self._found.popleft()
        else:
            with self._spans.span("receiving tokens"):
                found = self._closing.take().view(torch.float64).view(2, -1)  # (2, B)
        group.ids = found[0, :, None].long()  # (B, 1); of a sequence that has ended it does not matter what it is
        ids, margins = group.ids[:, 0].tolist(), found[1].tolist()
        for place, (number, token, margin) in enumerate(zip(group.numbers, ids, margins, strict=True)):
            if group.ended[place]:
                continue
            call.margins[number] = min(call.margins[number], margin)
            if token == call.eos_token_id:
                group.ended[place] = call.has_ended[number] = True
            else:
                call.answers[number].append(token)


def groups_of(lengths: Sequence[int], batch_size: int, num_stages: int) -> list[list[int]]:
    """The numbers of the prompts of every group, longest first: what memory it takes shows at once, and few columns are pads. As many
    groups as stages make a batch; fewer prompts than that are dealt evenly."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    num_slots = min(num_stages, batch_size)
    size = batch_size // num_slots if len(order) > batch_size else math.ceil(len(order) / num_slots)
    return [order[start : start + size] for start in range(0, len(order), size)] if order else []
