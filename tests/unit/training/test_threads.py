"""With how many threads a rank computes: a flag, the user's OMP_NUM_THREADS, or its share of the cores; and it says which."""

from pathlib import Path

import pytest
from support.ranks import train

from training.job.threads import Threads, compute_threads

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
SHARED = Threads(4, "8 cores / 2 ranks here")


@pytest.mark.parametrize(
    ("flag", "environment", "found"),
    [
        (None, {}, SHARED),
        (3, {"OMP_NUM_THREADS": "2"}, Threads(3, "--num-threads")),
        (None, {"OMP_NUM_THREADS": "2"}, Threads(2, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": " 12 "}, Threads(12, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "5,2"}, Threads(5, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "1"}, Threads(1, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "1", **TORCHRUN}, SHARED),
        (None, {"OMP_NUM_THREADS": "2", **TORCHRUN}, Threads(2, "OMP_NUM_THREADS")),
        (
            None,
            {"OMP_NUM_THREADS": "1", **TORCHRUN, "LOCAL_WORLD_SIZE": "1"},
            Threads(1, "OMP_NUM_THREADS"),
        ),
        (None, {"OMP_NUM_THREADS": ""}, SHARED),
        *((None, {"OMP_NUM_THREADS": wrong}, SHARED._replace(ignored=wrong)) for wrong in ("abc", "0", "-1", "9999", "2x")),
    ],
)
def test_the_number_of_threads_is_the_users_word_before_it_is_a_share_of_the_cores(
    flag: int | None, environment: dict[str, str], found: Threads
) -> None:
    assert compute_threads(flag, environment, 8, 2) == found


def test_more_ranks_than_cores_compute_with_one_thread_each() -> None:
    assert compute_threads(None, {}, 2, 4) == Threads(1, "2 cores / 4 ranks here")
    assert compute_threads(None, {}, 1, 1) == Threads(1, "1 core / 1 rank here")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1", ["1 compute thread per rank (OMP_NUM_THREADS)"]),
        (
            "many",
            [
                "OMP_NUM_THREADS must be a number of threads, 1 .. 4096; it is 'many' and is ignored",
                "2 ranks here)",
            ],
        ),
    ],
)
def test_a_run_says_on_whose_word_it_computes_with_so_many_threads(
    value: str,
    said: list[str],
    model_folder: Path,
    tasks: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was overruled without a word."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})  # one thread in any case: OpenMP's pool does not survive a fork
    flags = {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
    }
    ranks = train(tmp_path / "ranks", stages=2, num_threads=None, total_steps=1, batch_size=1, **flags)
    for text in said:
        assert text in ranks[0].text
