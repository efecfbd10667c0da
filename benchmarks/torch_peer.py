"""The schedules of torch.distributed.pipelining as peers, over any module that stands for one stage."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comms.place import Place

KINDS = ("torch-gpipe", "torch-1f1b")


class TorchSchedule:
    """One rank's torch stage and schedule, and a process group of its own. Made by all ranks at once."""

    def __init__(
        self,
        kind: str,
        module: nn.Module,
        *,
        place: Place,
        num_micro_batches: int,
        example_in: Tensor,
        example_out: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """example_in, example_out: one micro-batch. loss_fn(output, target): the share of one micro-batch in the step's loss."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        group = dist.new_group(list(range(place.world_size)))
        stage = PipelineStage(
            module, place.pp, place.pp_size, torch.device("cpu"), input_args=example_in, output_args=example_out, group=group
        )
        schedule = {"torch-gpipe": ScheduleGPipe, "torch-1f1b": Schedule1F1B}[kind]
        self._schedule = schedule(stage, num_micro_batches, loss_fn=loss_fn, scale_grads=False)
        self._place = place

    def run(self, batch: Tensor, targets: Tensor) -> float:
        """All forwards and backwards of a step. batch, targets: cut into micro-batches along dimension 0. Returns the summed loss, 0 on all
        but the last stage."""
        losses: list[Tensor] = []
        arguments = (batch,) if self._place.is_first_stage else ()
        if self._place.is_last_stage:
            self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*arguments, return_outputs=False)
        return sum(loss.item() for loss in losses)
