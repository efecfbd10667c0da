"""Schedules, cuts, places, curves and flags: functions of plain values, tested without processes."""

import itertools
import math
from pathlib import Path

import pytest
from support.ranks import REPOSITORY

from comms.place import place_of
from comms.rendezvous import door_of_torchrun, parse_dist_url
from optim.schedule import LearningRate
from pipeline_parallel.partition import cut_by_num_layers, even_cut
from training.config.cli import parse_config
from training.config.flags import describe_flags
from training.config.train import Config, shared_flags
from user_error import UserError

NEEDED = ["--model-name", "m", "--task-name", "t.jsonl", "--checkpoint-path", "c", "--total-steps", "12"]


def test_every_even_cut_covers_the_model_and_gives_every_stage_a_layer() -> None:
    for num_layers, num_stages in itertools.product(range(1, 45), range(1, 45)):
        if num_stages > num_layers:
            with pytest.raises(UserError, match=f"--pipeline-group-size {num_layers} or less"):
                even_cut(num_layers, num_stages)
            continue
        cut = even_cut(num_layers, num_stages)
        assert [i for first, last in cut for i in range(first, last)] == list(range(num_layers))
        sizes = [last - first for first, last in cut]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_cut_by_num_layers_is_exact_or_refused() -> None:
    for num_layers, num_stages, n in itertools.product(range(1, 30), range(1, 10), range(12)):
        fits = n >= 1 and n * num_stages >= num_layers and n * (num_stages - 1) < num_layers
        if fits:
            cut = cut_by_num_layers(num_layers, num_stages, n)
            assert cut == tuple((s * n, min((s + 1) * n, num_layers)) for s in range(num_stages))
        else:
            with pytest.raises(UserError):
                cut_by_num_layers(num_layers, num_stages, n)
    assert cut_by_num_layers(44, 8, 6)[-1] == (42, 44)
    with pytest.raises(UserError, match="stage 7 of 8 would get none"):
        cut_by_num_layers(44, 8, 7)


def test_places_are_a_grid_of_replicas_and_stages() -> None:
    places = [place_of(rank, dp_size=2, pp_size=3) for rank in range(6)]
    assert [(p.dp, p.pp) for p in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert places[4].replica_ranks_of(1) == [1, 4]
    assert [p.is_last_stage for p in places] == [False, False, True] * 2
    for rank in (-1, 6):
        with pytest.raises(UserError, match=r"0 \.\. 5"):
            place_of(rank, dp_size=2, pp_size=3)


@pytest.mark.parametrize("curve", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("num_warmup_steps", [0, 1, 5])
def test_learning_rates_rise_to_the_peak_and_reach_their_end(curve: str, num_warmup_steps: int) -> None:
    rate = LearningRate(peak=2.0, minimum=0.5, num_warmup_steps=num_warmup_steps, num_steps=20, curve=curve)  # type: ignore[arg-type]
    rates = [rate.at(n) for n in range(1, 22)]
    warm, rest = rates[:num_warmup_steps], rates[num_warmup_steps:]
    assert all(0 < a < b < 2.0 for a, b in itertools.pairwise([*warm, 1.999]))
    assert rest[0] == 2.0
    if curve == "constant":
        assert set(rest) == {2.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(rest[:-1]))
        assert rates[19] == 0.5, "the last update runs at the minimum"


def test_linear_and_cosine_are_the_textbook_curves() -> None:
    linear = LearningRate(peak=3.0, minimum=1.0, num_warmup_steps=2, num_steps=7, curve="linear")
    assert [linear.at(n) for n in range(1, 8)] == pytest.approx([1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0])
    cosine = LearningRate(peak=2.0, minimum=0.0, num_warmup_steps=0, num_steps=5, curve="cosine")
    assert [cosine.at(n) for n in range(1, 6)] == pytest.approx([1 + math.cos(math.pi * k / 4) for k in range(5)])
    assert LearningRate(peak=2.0, minimum=0.0, num_warmup_steps=0, num_steps=1, curve="linear").at(1) == 2.0, (
        "a single update is at the peak"
    )


def test_warmup_counts_accumulation_steps_and_rounds_up_to_optimizer_steps() -> None:
    from training.start.weights import learning_rate_of

    config = parse_config([*NEEDED, "--gradient-accumulate-step", "4", "--warmup-steps", "5"], {})
    assert learning_rate_of(config, 3).num_warmup_steps == math.ceil(5 / 4) == 2
    config = parse_config([*NEEDED, "--gradient-accumulate-step", "4", "--warmup-proportion", "0.5"], {})
    assert learning_rate_of(config, 3).num_warmup_steps == 2
    config = parse_config([*NEEDED[:-1], "100", "--warmup-proportion", "0.07"], {})
    assert learning_rate_of(config, 100).num_warmup_steps == 7, "not 8, as ceil(0.07 * 100) would be"


def test_a_config_file_gives_flags_by_name_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\nseq-length: 128\nload_pretrained_model: false\ncuda-id: null\nadam-eps: 1.0e-7\n")
    config = parse_config(["--config", str(file), *NEEDED, "--seq-length", "64"], {})
    assert (config.lr, config.seq_length, config.load_pretrained_model, config.adam_eps) == (1e-4, 64, False, 1e-7)
    for text, message in (
        ("learning-rate: 1", "not a flag"),
        ("seq-lenght: 1", "did you mean 'seq-length'"),
        ("- 1", "one mapping"),
        ("lr: [1]", "must be one value"),
        ("a: b: c", "not"),
        ("seq-length: many", "--seq-length"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            parse_config(["--config", str(file), *NEEDED], {})


def test_torchruns_environment_fills_in_what_the_flags_leave_out() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    config = parse_config([*NEEDED, "--pipeline-group-size", "2"], environment)
    assert (config.rank, config.world_size, config.cuda_id, config.data_group_size) == (3, 4, 1, 2)
    config = parse_config([*NEEDED, "--pipeline-group-size", "2", "--rank", "1", "--world-size", "2", "--cuda-id", "0"], environment)
    assert (config.rank, config.world_size, config.cuda_id, config.data_group_size) == (1, 2, 0, 1)
    agent = {"MASTER_ADDR": "h", "MASTER_PORT": "5", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    door = door_of_torchrun(agent)
    assert door is not None and door.agent_prefix is not None
    assert door == door_of_torchrun({**agent, "TORCHELASTIC_RESTART_COUNT": "0"}), "agents count restarts each for itself"
    assert door_of_torchrun({}) is None
    with pytest.raises(UserError, match="RANK of the environment"):
        parse_config(NEEDED, {"RANK": "x"})


def test_dist_urls_are_read_or_refused() -> None:
    assert parse_dist_url("tcp://10.0.0.1:9000").port == 9000
    assert parse_dist_url("tcp://[::1]:80").host == "::1"
    for bad in ("10.0.0.1:9000", "http://h:1", "tcp://h", "tcp://:9", "tcp://h:0", "tcp://h:x", ""):
        with pytest.raises(UserError, match="tcp://HOST:PORT"):
            parse_dist_url(bad)


def test_shared_flags_leave_out_what_a_host_may_spell_its_own_way() -> None:
    shared = shared_flags(parse_config(NEEDED, {}))
    assert "--rank" not in shared and "--model-name" not in shared
    assert {"--lr", "--seq-length", "--total-steps", "--seed", "--pp-mode"} <= set(shared)


def test_the_documentation_of_flags_is_up_to_date() -> None:
    text = (REPOSITORY / "docs" / "flags.md").read_text()
    assert text.endswith(describe_flags(Config)), "run: python -m training.config > docs/flags.md"
