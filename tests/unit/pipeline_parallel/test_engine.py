"""What the engine holds, when it computes what, and what compression and recomputation change: on real ranks, with the code that trains."""

import itertools
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.ranks import example_tokens, run_ranks
from support.stages import load
from torch import nn

from comms.groups import join_process_group, make_groups
from comms.place import place_of
from comms.spans import Spans
from modules.linear import Linear, WeightGradients
from pipeline_parallel.partition import Cut, even_cut
from pipeline_parallel.schedule import PipelineMode, order
from pipeline_parallel.simulator import peak_in_flight
from training.compute.gradient import GlobalGradient, Schedule, wire_report
from training.job.job import COLLECTIVE_TIMEOUT

SEQ_LENGTH, NUM_SEQUENCES = 24, 8
MODES: tuple[PipelineMode, ...] = get_args(PipelineMode)


def make_gradient(
    folder: Path, rank: int, store: dist.Store, cut: Cut, schedule: Schedule, spans: Spans
) -> tuple[GlobalGradient, nn.Module]:
    """One pipeline over the stages of ``cut``, micro-batches of one sequence; and this rank's stage."""
    place = place_of(rank, dp_size=1, pp_size=len(cut))
    join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
    stage = load(folder, *cut[rank])
    gradient = GlobalGradient(
        place=place,
        groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
        stage=stage,
        spans=spans,
        peer_names=[f"rank {r}" for r in range(len(cut))],
        schedule=schedule,
        batch_size=NUM_SEQUENCES,
        micro_batch_size=1,
        seq_length=SEQ_LENGTH,
        clip_grad_norm=0,
    )
    return gradient, stage


class Alive:
    """Counts how many of the storages it was shown are still held by anybody."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def show(self, tensor: torch.Tensor) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), self._gone)

    def _gone(self) -> None:
        self.now -= 1


def test_alive_counts_storages_that_are_held() -> None:
    alive = Alive()
    held = [torch.ones(3) for _ in range(4)]
    for tensor in held:
        alive.show(tensor)
    assert alive.now == 4
    del held[1], tensor
    assert (alive.now, alive.peak) == (3, 4)


@pytest.mark.parametrize("mode", MODES)
def test_activations_in_flight_are_as_many_as_the_simulator_says(model_folder: Path, tmp_path: Path, mode: PipelineMode) -> None:
    """Counted where they are held: what a layer saves for its backward, from the forward until nobody needs it any more."""
    num_stages, extra = 4, 1
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        schedule = Schedule(mode=mode, extra_warmup=(extra,) * (num_stages - 1))
        gradient, stage = make_gradient(model_folder, rank, store, even_cut(4, num_stages), schedule, Spans())
        alive = Alive()
        stage.transformer.h[str(rank)].mlp.fc_out.register_forward_pre_hook(lambda _, args: alive.show(args[0]))  # type: ignore[union-attr, index, operator]
        gradient.compute(tokens[None], num_targets)
        expected = order(mode, stage=rank, num_stages=num_stages, num_micro_batches=NUM_SEQUENCES, extra_warmup=(extra,) * (num_stages - 1))
        if mode == "zb":  # gaps may be filled earlier than the order says, never later
            assert alive.peak <= peak_in_flight(expected)
        else:
            assert alive.peak == peak_in_flight(expected)
        assert alive.now == 0, "nothing outlives the step"

    run_ranks(rank_main, num_stages, tmp_path)


def test_recomputation_holds_less_and_runs_each_forward_twice(model_folder: Path, tmp_path: Path) -> None:
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    for recomputes in (False, True):

        def rank_main(rank: int, store: dist.Store, recomputes: bool = recomputes) -> None:
            gradient, stage = make_gradient(model_folder, rank, store, even_cut(4, 2), Schedule(mode="gpipe"), Spans())
            stage.recomputes = recomputes  # type: ignore[assignment]
            alive, calls = Alive(), []
            for block in stage.transformer.h.values():  # type: ignore[union-attr, operator]
                block.mlp.fc_out.register_forward_pre_hook(lambda _, args: alive.show(args[0]))
                block.register_forward_pre_hook(lambda *_: calls.append(1))  # the second time stops as soon as all is there again
            gradient.compute(tokens[None], num_targets)
            assert len(calls) == 2 * NUM_SEQUENCES * (2 if recomputes else 1)
            assert alive.peak <= 2 if recomputes else alive.peak == 2 * NUM_SEQUENCES

        (tmp_path / str(recomputes)).mkdir()
        run_ranks(rank_main, 2, tmp_path / str(recomputes))


def test_weight_gradients_fill_the_time_in_which_a_message_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    """Stage 0 is held up before every forward; stage 1 has weight gradients left over and computes them meanwhile."""
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        spans = Spans(record=True)
        gradient, stage = make_gradient(model_folder, rank, store, even_cut(4, 2), Schedule(mode="zb"), spans)
        gradient.compute(tokens[None], num_targets)  # the first takes longer than what it is to be compared with
        gradient.forget()
        spans.recorded.clear()
        if rank == 0:
            stage.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        gradient.compute(tokens[None], num_targets)
        if rank == 1:
            order_of_work = [(span.name, span.micro_batch) for span in spans.recorded if span.name in ("forward", "weight gradient")]
            for i in range(NUM_SEQUENCES - 1):  # without filling, two would be in flight before the first weight gradient
                assert order_of_work.index(("weight gradient", i)) < order_of_work.index(("forward", i + 1))

    run_ranks(rank_main, 2, tmp_path)


def test_a_weight_gradient_left_over_has_the_bits_of_an_immediate_one_and_is_reported_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for has_bias, shape in itertools.product((True, False), ((7, 24), (2, 5, 24), (1, 1, 24))):
        plain, own = Linear(24, 36, bias=has_bias), Linear(24, 36, bias=has_bias)
        own.load_state_dict(plain.state_dict())
        complete: list[torch.Tensor] = []
        own.weight_gradients = WeightGradients(complete.append)
        inputs = [torch.randn(shape, generator=generator) for _ in range(3)]
        for i, x in enumerate(inputs):
            xs = [x.clone().requires_grad_() for _ in range(2)]
            own.weight_gradients.micro_batch, own.weight_gradients.is_final = i, i == 2
            for layer, leaf in zip((plain, own), xs, strict=True):
                (layer(leaf).tanh() ** 2).sum().backward()
            assert torch.equal(xs[0].grad, xs[1].grad)  # type: ignore[arg-type]
            assert own.weight.grad is None
        while (i := own.weight_gradients.next_micro_batch) is not None:
            assert bool(complete) == (i == 3)
            own.weight_gradients.add_next()
        for one, other in zip(plain.parameters(), own.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        assert {id(p) for p in complete} == {id(p) for p in own.parameters()} and len(complete) == 1 + has_bias


def test_a_frozen_linear_leaves_nothing_over() -> None:
    linear = Linear(4, 4)
    linear.weight_gradients = WeightGradients(lambda _: None)
    x = torch.randn(2, 4, requires_grad=True)
    linear.requires_grad_(False)(x).sum().backward()
    assert linear.weight_gradients.next_micro_batch is None and x.grad is not None
    linear.bias.requires_grad_(True)  # one of two trains
    linear(x).sum().backward()
    linear.weight_gradients.add_next()
    assert linear.weight.grad is None and torch.equal(linear.bias.grad, torch.full((4,), 2.0))  # type: ignore[arg-type]


def gradients_of_step(
    folder: Path, tmp_path: Path, schedule: Schedule, num_stages: int = 2
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All stages' gradients after one step, and what rank 0's wire report says."""
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    tmp_path.mkdir()

    def rank_main(rank: int, store: dist.Store) -> None:
        gradient, stage = make_gradient(folder, rank, store, even_cut(4, num_stages), schedule, Spans())
        decision = gradient.compute(tokens[None], num_targets)
        save_file({name: p.grad.clone() for name, p in stage.named_parameters()}, tmp_path / f"{rank}.safetensors")  # type: ignore[union-attr]
        if rank == 0:
            (tmp_path / "wire.json").write_text(json.dumps({**vars(wire_report(decision)), "loss": decision.loss}))

    run_ranks(rank_main, num_stages, tmp_path)
    gradients = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    return gradients, json.loads((tmp_path / "wire.json").read_text())


def relative_difference(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], keep: Callable[[str], bool] = lambda _: True
) -> float:
    """Of two sets of gradients as a whole."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one if keep(name))
    return (difference / sum(float(one[name].square().sum()) for name in one if keep(name))) ** 0.5


def test_each_wire_dtype_changes_the_gradient_by_as_much_as_it_should_and_saves_the_bytes_it_should(
    wide_model: Path, tmp_path: Path
) -> None:
    """Closeness and difference: a codec that is silently off would pass a test of closeness alone."""
    exact, wire = gradients_of_step(wide_model, tmp_path / "none", Schedule(mode="1f1b"))
    full = 2 * NUM_SEQUENCES * SEQ_LENGTH * 64 * 4
    assert wire["num_bytes"] == full and wire["activation_error"] is wire["gradient_error"] is None
    for name, share, least, most in (
        ("bf16", 0.5, 5e-4, 8e-3),
        ("fp16", 0.5, 5e-5, 2e-3),
        ("int8", 0.27, 1e-3, 2e-2),
        ("int4", 0.14, 2e-2, 0.4),
    ):
        schedule = Schedule(mode="1f1b", wire_dtype=name, wire_dtype_grad=name)  # type: ignore[arg-type]
        rounded, wire = gradients_of_step(wide_model, tmp_path / name, schedule)
        assert least < relative_difference(exact, rounded) < most, name
        assert 0 < wire["num_bytes"] <= share * full, name
        assert least / 10 < wire["activation_error"] < most and least / 10 < wire["gradient_error"] < most, name


def test_the_two_directions_are_compressed_apart(wide_model: Path, tmp_path: Path) -> None:
    """Gradients of the last stage do not depend on what travels back; those of the first do."""
    exact, _ = gradients_of_step(wide_model, tmp_path / "none", Schedule(mode="1f1b"))
    rounded, wire = gradients_of_step(wide_model, tmp_path / "back", Schedule(mode="1f1b", wire_dtype_grad="int8"))
    last = {name for name in exact if name.startswith(("transformer.h.2", "transformer.h.3", "transformer.ln_f", "lm_head"))}
    assert relative_difference(exact, rounded, last.__contains__) == 0
    assert 1e-3 < relative_difference(exact, rounded, lambda name: name not in last) < 2e-2
    assert wire["activation_error"] is None and wire["gradient_error"] > 0


def test_what_overflows_on_the_wire_is_noticed(wide_model: Path, tmp_path: Path) -> None:
    """A value that fp16 cannot hold becomes infinite, and the vote then skips the step on every rank."""
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        gradient, stage = make_gradient(wide_model, rank, store, even_cut(4, 2), Schedule(mode="1f1b", wire_dtype="fp16"), Spans())
        if rank == 0:
            with torch.no_grad():
                stage.transformer.wte.weight[:, 0] = 1e5  # type: ignore[union-attr, index, operator]
        assert gradient.compute(tokens[None], num_targets).skip

    run_ranks(rank_main, 2, tmp_path)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 64, which int4's groups divide."""
    from support.models import make_model

    folder = tmp_path_factory.mktemp("wide") / "model"
    make_model(folder, n_embd=64)
    return folder
