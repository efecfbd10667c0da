"""The job that faults are planted in."""

from pathlib import Path
from typing import Any

import pytest
from support.ranks import free_port


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 20,
        "checkpoint_steps": 3,
        "pipeline_group_size": 2,
        "data_group_size": 2,
        "world_size": 4,
        "device": "cpu",
        "num_threads": 1,
        "rendezvous_timeout": 60,
        "dist_url": f"tcp://127.0.0.1:{free_port()}",
    }
