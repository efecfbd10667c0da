"""A run that cannot fit its hosts is refused before anything is read, with numbers and with what would fit; a healthy one never is."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import evaluate, train
from support.tiers import full

from modules.families import read_model_config
from training.config.cli import complete
from training.config.train import Config
from training.memory import fitting, room
from training.memory.cures import Cure, advice, cures, evaluation_changes, training_changes
from training.memory.fitting import _bound, _predict_training
from training.memory.prediction import predict_stages
from training.memory.room import Needs, Room, Shortage, shortages
from user_error import UserError

GIB = 2**30
MIB = 2**20
CPU = fitting.torch.device("cpu")


def rooms_of(*hosts: str, free: int, group: str = "", group_free: int | None = None, gpu: str = "") -> list[Room]:
    own = free if group_free is None else group_free
    return [
        Room(rank=r, stage=r, host=host, group=group, gpu=gpu, host_free=free, group_free=own, gpu_free=free)
        for r, host in enumerate(hosts)
    ]


def of_host(*sizes: float) -> list[Needs]:
    return [Needs(host=int(size * GIB)) for size in sizes]


def test_ranks_of_one_host_add_up_and_those_of_others_do_not() -> None:
    assert not shortages(rooms_of("a", "b", free=10 * GIB), of_host(8, 8))
    (found, *_) = shortages(rooms_of("a/1", "a/1", free=10 * GIB), of_host(8, 8))
    assert found.is_clear and found.ranks == (0, 1) and found.needed == 16 * GIB
    said = found.in_words()
    assert said.startswith("its 2 ranks (0, 1) are predicted to take 16.00 GiB of the memory of host a, of which 10.00 GiB")


@pytest.mark.parametrize(("needed", "verdict"), [(8.0, "fits"), (8.6, "fits"), (8.8, "may not"), (11.7, "may not"), (11.8, "cannot")])
def test_a_run_is_refused_only_where_the_prediction_exceeds_the_room_even_if_it_is_15_percent_too_high(needed: float, verdict: str) -> None:
    found = shortages(rooms_of("a", free=10 * GIB), of_host(needed))
    assert bool(found) == (verdict != "fits")
    assert all(shortage.is_clear == (verdict == "cannot") for shortage in found)


def test_a_container_counts_for_its_own_ranks_and_not_for_the_whole_host() -> None:
    """Two containers of 8 GiB on a host of 64."""
    rooms = rooms_of("a", free=64 * GIB, group="one", group_free=8 * GIB)
    rooms += [dataclasses.replace(rooms[0], rank=1, stage=1, group="two")]
    assert not shortages(rooms, of_host(6, 6))
    (found,) = shortages(rooms, of_host(6, 12))
    assert found.ranks == (1,) and found.is_clear and "control group" in found.in_words()


def test_a_gpu_counts_for_itself_and_what_is_offloaded_for_the_host() -> None:
    rooms = rooms_of("a", "a", free=16 * GIB)
    rooms = [dataclasses.replace(one, gpu=f"cuda:{one.rank} id{one.rank}", host_free=20 * GIB, group_free=20 * GIB) for one in rooms]
    assert not shortages(rooms, [Needs(gpu=12 * GIB), Needs(gpu=12 * GIB)])
    (found,) = shortages(rooms, [Needs(gpu=12 * GIB), Needs(gpu=19 * GIB)])
    assert found.where == "the memory of cuda:1 on host a" and found.kind == "gpu"
    found = shortages(rooms, [Needs(gpu=2 * GIB, host=15 * GIB), Needs(gpu=2 * GIB, host=15 * GIB)])[0]
    assert found.kind == "host" and found.ranks == (0, 1)


SMALL = {
    "model_type": "gptj", "vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 64,
}  # fmt: skip


def config_of(**flags: Any) -> Config:
    given = {"model_name": "m", "task_name": "t", "checkpoint_path": "c", "total_steps": 1, "seq_length": 64}
    return complete(Config(**{**given, "micro_batch_size": 4, "batch_size": 8, "device": "cpu", **flags}), {})


def made_up(config: Config) -> list[Needs]:
    """A predictor that costs nothing: 96 GiB, of which every change that helps leaves a known part; the first stage is a bit larger."""
    size = 96.0
    for name, value, part in (
        ("recompute", "layer", 0.75),
        ("micro_batch_size", 1, 0.9),
        ("optimizer", "8bit-adam", 0.8),
        ("train", "lora", 0.3),
        ("base_quantization", "int8", 0.5),
    ):
        size *= part if getattr(config, name) == value else 1
    each = size / config.num_stages
    return [Needs(host=int(each * GIB) + (s == 0)) for s in range(config.num_stages)]


def found_with(free: float, config: Config | None = None, num_layers: int = 8) -> tuple[list[Cure], str]:
    """The cures of a run by itself on a host where so many GiB are free, and what is said of them."""
    config = config or config_of()
    stages = tuple(range(config.num_stages))
    needed = sum(needs.host for needs in made_up(config))
    shortage = Shortage(where="host a", kind="host", ranks=stages, stages=stages, needed=needed, free=int(free * GIB))
    found = cures(config, training_changes(config, num_layers, is_cpu=True), made_up, shortage)
    return found, advice(found, shortage.free)


def test_the_cures_that_are_named_fit_and_change_least_first() -> None:
    found, said = found_with(80)
    assert [cure.flags for cure in found if cure.needed <= 80 * GIB] == [
        "--recompute layer",
        "--optimizer 8bit-adam",
        "--train lora",
        "--train lora --base-quantization int8",
    ]
    assert said.startswith("By the same prediction this would fit: --recompute layer (72.00 GiB), or --optimizer 8bit-adam (76.80 GiB)")
    assert "--micro-batch-size 1 (" not in said, "86 GiB"


def test_more_stages_are_named_with_the_hosts_that_they_take_and_no_more_than_are_needed() -> None:
    found, said = found_with(13, config_of(train="layernorm"))
    assert "--pipeline-group-size 8 on 8 times the hosts (12.00 GiB)" in said
    assert [cure.times for cure in found if cure.times > 1] == [2, 4, 8]
    halves, said = found_with(60, config_of(pipeline_group_size=2, world_size=2, train="layernorm"))
    assert "--pipeline-group-size 4 on 2 times the hosts (48.00 GiB)" in said and halves[-1].times == 2, "two of four on this host"


def test_where_nothing_fits_the_nearest_is_named() -> None:
    found, said = found_with(1, num_layers=2)
    assert said.startswith("Nothing that was tried would fit; nearest comes --train lora --base-quantization int8 --recompute layer")
    assert "more hosts" in said and "smaller model" in advice([], 1)
    assert min(cure.needed for cure in found) > GIB


def test_a_cure_that_cannot_be_run_is_not_named() -> None:
    def no_package(config: Config) -> list[Needs]:
        if config.optimizer == "8bit-adam":
            raise UserError("needs the package bitsandbytes")
        return [Needs(gpu=2)] * config.num_stages

    shortage = Shortage(where="cuda:0", kind="gpu", ranks=(0,), stages=(0,), needed=2, free=1)
    found = cures(config_of(), training_changes(config_of(), 2, is_cpu=False), no_package, shortage)
    assert not any("8bit" in cure.flags for cure in found)
    assert any(cure.flags == "--optimizer-offload cpu" for cure in found)
    assert any(cure.in_words().startswith("--pipeline-group-size 2 on 2 times the GPUs (") for cure in found)


def test_an_evaluation_is_helped_by_precision_quantisation_and_stages() -> None:
    flags = list(evaluation_changes(config_of(), 4))
    assert flags[0] == {"bf16": True} and flags[-1] == {"pipeline_group_size": 4}
    shortage = Shortage(where="host a", kind="host", ranks=(0,), stages=(0,), needed=2, free=1)
    (cure, *_) = cures(config_of(), iter(flags), made_up, shortage)
    assert cure.flags == "--bf16 true", "as it is typed"


@full
@pytest.mark.parametrize("flags", [{"dropout": 0.1}, {"bf16": True, "master_weights": "fp32"}, {"pp_mode": "zb"}], ids=str)
def test_what_lets_a_small_run_off_the_rehearsal_is_more_than_any_rehearsal_says(flags: dict[str, Any]) -> None:
    config, model_config = config_of(**flags), read_model_config(SMALL)
    (stage,) = predict_stages(config, model_config, ((0, 2),), (8,), CPU)
    assert _bound(config, model_config, (0, 2), 8) > stage.total
    (needs,) = _predict_training(config, model_config=model_config, device=CPU)
    assert needs.host < stage.total, "one or two micro-batches are in flight, not eight"


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder, "task_name": tasks[0], "checkpoint_path": tmp_path / "run", "seq_length": 32, "batch_size": 4,
        "micro_batch_size": 2, "total_steps": 2,
    }  # fmt: skip


def with_room(num_bytes: int) -> Callable[[int], None]:
    """As if every host had so much free; and nothing may be read."""

    def before(_: int) -> None:
        import training.runner
        import training.start.weights

        def read(*_: Any, **__: Any) -> Any:
            raise AssertionError("something was read")

        fitting.FREED_WITHIN_S = 0.0
        few = [{"recompute": "layer"}, {"train": "lora", "base_quantization": "int8"}]  # each takes seconds
        fitting.training_changes = lambda *a, **k: iter(few)
        look = fitting.look_at_room
        fitting.look_at_room = lambda *a: dataclasses.replace(look(*a), host_free=num_bytes, group_free=num_bytes)
        training.start.weights.load_weights = read
        training.runner.agree = read

    return before


def test_a_training_that_cannot_fit_is_refused_on_every_rank_before_anything_is_read(flags: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ranks = train(tmp_path / "ranks", stages=2, expect=1, before=with_room(MIB), **flags)
    for rank in ranks:
        assert "this training cannot fit: its 2 ranks (0, 1) are predicted to take" in rank.text, rank.text
        assert "of which 1.00 MiB are free, swap included" in rank.text
        assert "--train lora --base-quantization int8 (" in rank.text
        assert "python -m training.memory" in rank.text
        assert "Traceback" not in rank.text and "something was read" not in rank.text
    assert not list((tmp_path / "run").glob("*"))


def test_a_training_that_may_not_fit_is_warned_of_and_goes_on(flags: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(seq_length=32, batch_size=4, micro_batch_size=2)
    model_config = read_model_config({**SMALL, "vocab_size": 320, "n_embd": 32, "n_layer": 4, "rotary_dim": 4, "n_positions": 64})
    needed = _predict_training(config, model_config=model_config, device=CPU)[0].host

    def before(_: int) -> None:
        look = fitting.look_at_room
        fitting.look_at_room = lambda *a: dataclasses.replace(look(*a), host_free=needed)

    (rank,) = train(tmp_path / "ranks", before=before, **flags)
    assert "this training may not fit: rank 0 is predicted to take" in rank.text


def test_memory_that_a_process_on_its_way_out_gives_back_is_waited_for(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(_: int) -> None:
        look, seen = fitting.look_at_room, [0]
        fitting.LOOK_AGAIN_S = 0.05

        def freed(*a: Any) -> Room:
            seen[0] += 1
            return look(*a) if seen[0] > 3 else dataclasses.replace(look(*a), host_free=MIB)

        fitting.look_at_room = freed

    train(tmp_path / "ranks", stages=2, before=before, **flags)


def test_an_evaluation_whose_weights_cannot_fit_is_refused_on_every_rank(
    model_folder: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = fitting.look_at_room
    monkeypatch.setattr(fitting, "look_at_room", lambda *a: dataclasses.replace(look(*a), host_free=100_000))
    monkeypatch.setattr(fitting, "FREED_WITHIN_S", 0.0)
    ranks = evaluate(tmp_path / "ranks", stages=2, expect=1, model_name=model_folder, evaluation_data=tasks[0])
    for rank in ranks:
        assert "the model alone cannot fit: its 2 ranks (0, 1) are predicted to take" in rank.text
        assert "--pipeline-group-size 4 on 2 times the hosts" in rank.text or "--base-quantization int8" in rank.text


def test_a_disk_that_is_smaller_than_one_checkpoint_is_refused_before_anything_is_read(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(_: int) -> None:
        with_room(100 * GIB)(_)
        fitting.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(100_000, 10_000, 90_000)  # type: ignore[attr-defined]

    ranks = train(tmp_path / "ranks", stages=2, expect=1, before=before, **flags)
    for rank in ranks:
        assert "a checkpoint of this run needs" in rank.text and "has 0.09 MiB free of 0.10 MiB in all" in rank.text, rank.text
        assert "--checkpoint-path" in rank.text and "something was read" not in rank.text


def test_a_disk_that_is_full_now_may_be_emptied_before_the_first_save(flags: dict[str, Any], tmp_path: Path) -> None:
    """Refusing would be needless."""

    def before(_: int) -> None:
        usage = shutil.disk_usage("/")
        fitting.shutil = type("shutil", (), {"disk_usage": staticmethod(lambda path: usage._replace(free=1000))})  # type: ignore[assignment,misc]

    (rank,) = train(tmp_path / "ranks", before=before, **flags)
    assert "unless room is made before the first save, it will fail" in rank.text


def test_what_a_checkpoint_needs_is_what_it_takes(flags: dict[str, Any], tmp_path: Path) -> None:
    """All files of weights and training state, less their headers."""

    def before(_: int) -> None:
        check = fitting._bytes_of_part

        def told(*a: Any) -> int:
            print(f"part: {check(*a)}")
            return check(*a)

        fitting._bytes_of_part = told

    ranks = train(tmp_path / "ranks", stages=2, before=before, **flags)
    parts = sum(int(rank.text.partition("part: ")[2].split()[0]) for rank in ranks)
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert parts < written < 1.1 * parts


def test_swap_and_what_zfs_gives_back_are_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    statistics = tmp_path / "arcstats"
    monkeypatch.setattr(room, "ARC_SIZE", statistics)
    plain = room.look_at_room(0, 0, "a", CPU).host_free
    statistics.write_text(f"name type data\nhits 4 1\nsize                            4    {2**40}\n")
    assert room.look_at_room(0, 0, "a", CPU).host_free - plain > 2**39
    monkeypatch.setattr(room.psutil, "swap_memory", lambda: type("swap", (), {"free": 2**41})())
    assert room.look_at_room(0, 0, "a", CPU).host_free - plain > 2**40 + 2**39


@pytest.mark.parametrize(("is_integrated", "free"), [(0, 5 * GIB), (1, 2**50)], ids=["a card", "a chip that shares the host's memory"])
def test_a_gpu_has_what_its_driver_says_is_free(is_integrated: int, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("properties", (), {"uuid": "GPU-1", "is_integrated": is_integrated})()
    monkeypatch.setattr(room.torch.cuda, "mem_get_info", lambda device: (5 * GIB, 16 * GIB))
    monkeypatch.setattr(room.torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: type("memory", (), {"available": 2**50})())
    monkeypatch.setattr(room.psutil, "swap_memory", lambda: type("swap", (), {"free": 0})())
    found = room.look_at_room(0, 0, "a", fitting.torch.device("cuda", 1))
    assert found.gpu == "cuda:1 GPU-1" and found.gpu_free == free
