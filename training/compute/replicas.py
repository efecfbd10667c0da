"""A check at the start: replicas that do not hold the same weights would add gradients that belong to none of them."""

import json

import torch
from torch import Tensor

from modules.stage import Stage
from training.job.job import COLLECTIVE_TIMEOUT, Job
from user_error import UserError

SUM_CHUNK_ELEMENTS = 2**22


def check_replicas_alike(job: Job, stage: Stage) -> None:
    """Called by all ranks: every replica of a stage must start from the same weights, or the sum of their gradients belongs to none.

    Each parameter is reduced to two checksums of its bits. Raises UserError on a replica that differs from replica 0.
    """
    if job.place.dp_size == 1:
        return
    sums: dict[str, list[int]] = {}
    with job.spans.part("comparing replicas", sum(parameter.nbytes for parameter in stage.parameters()), "bytes") as part:
        for name, parameter in stage.named_parameters():
            sums[name] = _checksums(parameter)
            part.add(parameter.nbytes)
    job.store.set(f"weights/{job.place.pp}/{job.place.dp}", json.dumps(sums))
    if job.place.dp == 0:
        return
    key = f"weights/{job.place.pp}/0"
    job.store.wait([key], COLLECTIVE_TIMEOUT)
    first = json.loads(job.store.get(key))
    differing = [name for name in sums if sums[name] != first[name]]
    if differing:
        raise UserError(
            f"all replicas start from the same weights; {job.place.in_words} on host {job.roster[job.place.rank]['host']} has "
            "others than replica 0 in "
            f"{len(differing)} tensors, first {differing[0]}. Give every host the same copy of the model folder"
        )


def _checksums(parameter: Tensor) -> list[int]:
    """Sums of the words of a tensor, plain and weighted by their place, modulo 2**64; in pieces that cost little memory."""
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32}[parameter.itemsize]
    plain = weighted = 0
    for piece in parameter.detach().flatten().split(SUM_CHUNK_ELEMENTS):
        words = piece.view(word).long()
        plain += int(words.sum())
        weighted = weighted * 31 + int((words * torch.arange(1, len(words) + 1, device=words.device)).sum())
    return [plain % 2**64, weighted % 2**64]
