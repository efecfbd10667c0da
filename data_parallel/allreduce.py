"""Gradients live in flat buckets, and the buckets are summed over replicas while the last backward still runs.

Gradients are fp32 whatever the parameters are: micro-batches and replicas add up without losing small ones, and no sum of fp16 overflows.

A bucket holds parameters of ONE layer only: with three or more replicas the order in which a ring sums depends on the place in
the buffer, and a bucket that joined layers would make the result depend on the cut. Every parameter starts at a 64-byte boundary,
so that kernels take the same vector paths wherever it lies. Buckets are at most ``bucket_bytes`` large and go round-robin over
several process groups (on a long link one all-reduce of 100 MB takes three times the bandwidth bound, eight spread over four
groups 1.1 times).

Promises: after finish() every replica's ``.grad`` is the sum over replicas, the same bits on all of them. Without replicas the buckets are
there all the same (norm and clipping read them) and nothing is sent.
"""

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from comms.links import naming_the_peer
from comms.spans import Spans
from comms.transport import wait_for_all

BUCKET_BYTES = 25 * 2**20
ALIGNMENT_BYTES = 64


class _Bucket:
    """Consecutive parameters of a layer and the flat storage of their gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        element = torch.float32.itemsize
        starts, size = [], 0
        for parameter in parameters:
            starts.append(size)
            size += -(-parameter.numel() * element // ALIGNMENT_BYTES) * ALIGNMENT_BYTES // element
        self.flat = torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.grad_dtype = torch.float32
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
        self.num_missing = 0


class GradientBuckets:
    """The gradients of one stage. Call order per step: arm() before the last backward, finish() after it, zero() after the update."""

    def __init__(
        self,
        layers: Iterator[tuple[str, list[tuple[str, nn.Parameter]]]],
        *,
        groups: tuple[dist.ProcessGroup, ...],
        spans: Spans,
        added_elsewhere: Collection[nn.Parameter] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """layers: (layer key, [(name, parameter)...]) of the parameters that are trained. added_elsewhere: parameters whose gradients do
        not come from autograd; whoever adds them calls complete()."""
        self._groups, self._spans = groups, spans
        self._by_layer: dict[str, list[_Bucket]] = {}
        for key, parameters in layers:
            self._by_layer[key] = [_Bucket(piece) for piece in _pieces([p for _, p in parameters], bucket_bytes)]
        # Backward reaches the last layer first; replicas must launch in one order whatever the engine does.
        self._launch_order = [bucket for key in reversed(list(self._by_layer)) for bucket in self._by_layer[key]]
        self._next_launch = 0
        self._pending: list[dist.Work] = []
        self._armed = False
        self._hooks: list[RemovableHandle] = []
        self._bucket_of: dict[Tensor, _Bucket] = {parameter: bucket for bucket in self._launch_order for parameter in bucket.parameters}
        if groups:
            for parameter in self._bucket_of.keys() - set(added_elsewhere):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._added_by_backward))

    def _added_by_backward(self, parameter: Tensor) -> None:
        if self._armed:
            self.complete(parameter)

    def complete(self, parameter: Tensor) -> None:
        """The gradient of ``parameter`` is final. Called by autograd's hook in the armed backward, and by whoever adds gradients
        elsewhere, once per step and parameter."""
        if self._groups:
            self._bucket_of[parameter].num_missing -= 1
            self._launch_complete()

    def arm(self) -> None:
        """The next backward is the last of the step: a bucket whose gradients have all been added is final and may be sent."""
        for bucket in self._launch_order:
            bucket.num_missing = len(bucket.parameters)
        self._next_launch, self._armed = 0, True

    def _launch_complete(self) -> None:
        while self._next_launch < len(self._launch_order) and self._launch_order[self._next_launch].num_missing == 0:
            bucket = self._launch_order[self._next_launch]
            self._spans.mark("allreduce launched")
            with naming_the_peer("summing gradients with another replica of this stage"):
                work = dist.all_reduce(bucket.flat, group=self._groups[self._next_launch % len(self._groups)], async_op=True)
            assert work is not None, "this rank is a member of its replica groups"
            self._pending.append(work)
            self._next_launch += 1

    def finish(self) -> None:
        """Wait until every bucket holds the sum over replicas. Raises PeerLost."""
        self._armed = False
        if not self._groups:
            return
        assert self._next_launch == len(self._launch_order), "every parameter got its last gradient"
        with self._spans.span("allreduce"), naming_the_peer("summing gradients with another replica of this stage"):
            wait_for_all({work: self._groups[number % len(self._groups)] for number, work in enumerate(self._pending)})
        self._pending.clear()

    def close(self) -> None:
        """Let go of the parameters: no gradient is counted any more. ``.grad`` stays what it is, and its memory as long as that does."""
        for hook in self._hooks:
            hook.remove()
        self._by_layer, self._launch_order, self._bucket_of = {}, [], {}

    def zero(self) -> None:
        """Set every gradient to 0, in place: parameters keep their views."""
        for bucket in self._launch_order:
            bucket.flat.zero_()

    def flat_gradients(self) -> Iterator[tuple[str, list[Tensor]]]:
        """(layer key, its flat gradient buckets) in model order; the padding between parameters is 0."""
        for key, buckets in self._by_layer.items():
            yield key, [bucket.flat for bucket in buckets]


def _pieces(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Cut a layer's parameters into runs of at most ``bucket_bytes`` (a single larger parameter is a run of its own)."""
    run: list[nn.Parameter] = []
    total = 0
    for parameter in parameters:
        size = parameter.numel() * torch.float32.itemsize
        if run and total + size > bucket_bytes:
            yield run
            run, total = [], 0
        run.append(parameter)
        total += size
    if run:
        yield run
