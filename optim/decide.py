"""One reduction per optimizer step, from which every rank decides alike: skip, clip, log, stop.

The vector has an entry per layer for its squared gradient norm (filled only by the rank of replica 0 that owns the layer), one per
replica for its loss (filled by its last stage) and one for each wish that a rank can have. Adding zeros is exact, and every rank then
sums the entries in the same order, so the clip factor has the same bits for any cut of the model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from comms.links import naming_the_peer
from comms.place import Place
from comms.transport import wait_for

NORM_CHUNK_ELEMENTS = 2**20
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a rank asks all to do behind this step: stop: end the run; meet: part and meet anew; snapshot: keep one in host memory."""

    stop: bool = False
    meet: bool = False
    snapshot: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """Equal to the last bit on all ranks. loss: mean over the target tokens of the global batch, before the update. wishes: what any rank
    asks for. sums: what the ranks gave to be added up."""

    loss: float
    grad_norm: float
    clip_factor: float
    wishes: Wishes
    sums: tuple[float, ...]

    @property
    def skip(self) -> bool:
        """A step whose loss or gradient is not finite changes nothing."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def layer_square(flat_gradients: Iterable[Tensor], loss_scale: float = 1.0) -> float:
    """Sum of squares of a layer's gradient, which ``loss_scale`` is still in, accumulated in float64 over chunks of NORM_CHUNK_ELEMENTS
    in order."""
    pieces = (piece for flat in flat_gradients for piece in flat.split(NORM_CHUNK_ELEMENTS))
    squares = [torch.dot(wide, wide) for wide in (piece.double().div_(loss_scale) for piece in pieces)]
    return sum(torch.stack(squares).tolist())


def decide_step(
    *,
    place: Place,
    layers: list[str],
    squares: Mapping[str, float],
    loss: float,
    clip_grad_norm: float,
    device: torch.device,
    wishes: Wishes = NO_WISHES,
    sums: Sequence[float] = (),
) -> StepDecision:
    """Collective over all ranks. ``layers``: all layer keys of the model in order; ``squares``: of this rank's layers, after the
    sum over replicas; ``loss``: this replica's share on its last stage, else 0. clip_grad_norm 0 does not clip.
    ``sums``: further numbers to add over all ranks, for reports; as many on every rank."""
    wishes_at = len(layers) + place.dp_size
    num_votes = wishes_at + len(astuple(wishes))
    votes = torch.zeros(num_votes + len(sums), dtype=torch.float64)
    votes[num_votes:] = torch.tensor(sums, dtype=torch.float64)
    if place.dp == 0:
        for index, key in enumerate(layers):
            votes[index] = squares.get(key, 0.0)
    if place.is_last_stage:
        votes[len(layers) + place.dp] = loss
    votes[wishes_at:num_votes] = torch.tensor(astuple(wishes), dtype=torch.float64)
    on_wire = votes if dist.get_backend() == "gloo" else votes.to(device)
    with naming_the_peer("agreeing on the step with the other ranks"):
        wait_for(dist.all_reduce(on_wire, async_op=True))
    entries = on_wire.tolist()
    grad_norm = math.sqrt(sum(entries[: len(layers)]))
    clip_factor = 1.0
    if clip_grad_norm > 0:
        clip_factor = min(1.0, clip_grad_norm / (grad_norm + CLIP_EPS))
    return StepDecision(
        loss=sum(entries[len(layers) : wishes_at]),
        grad_norm=grad_norm,
        clip_factor=clip_factor,
        wishes=Wishes(**{f.name: n > 0 for f, n in zip(fields(Wishes), entries[wishes_at:num_votes], strict=True)}),
        sums=tuple(entries[num_votes:]),
    )
