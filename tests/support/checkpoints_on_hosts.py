"""A step saved by two hosts that share no disk, in one process: one root each, for the tests of gather and inspect."""

from pathlib import Path

import torch
from support.checkpoints import adamw_state, finish_step, hf_model, loaded_stage, save_hf, write_parts

from checkpoint.layer_store import StepWriter

NUM_LAYERS = 3
CUT = [[0, 2], [2, 3]]  # layers of the two hosts' stages


def make_source(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return save_hf(hf_model(NUM_LAYERS, dtype), folder)


def save_on_hosts(base: Path, step: int, model: Path, *, position: int | None = None, num_updates: int = 1, commits: int = 2) -> list[Path]:
    """``base``/hostA/<step> and ``base``/hostB/<step>. commits=1: host B dies between prepare and commit."""
    roots = [base / "hostA", base / "hostB"]
    writers = [StepWriter(root, step) for root in roots]
    records = []
    for writer, (first, last) in zip(writers, CUT, strict=True):
        writer.begin()
        stage = loaded_stage(model, first, last)
        records.append(write_parts(writer, model, stage, adamw_state(stage, num_updates)))
    trainer = {
        "optimizer_step": num_updates,
        "num_skipped": 0,
        "cut": CUT,
        "grid": {"stages": 2, "replicas": 1},
        "num_threads": 1,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "loss_scale": None,
    }
    folders = []
    for i, writer in enumerate(writers):
        if i >= commits:
            writer.commit = lambda writer=writer: writer.partial  # type: ignore[method-assign]
        folders.append(finish_step(writer, records[i], [model], elsewhere=records[1 - i], position=position, **trainer))
    return folders
