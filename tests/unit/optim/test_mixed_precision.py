"""Masters, loss scale, 8-bit moments: what half precision must not lose."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import masters
from optim.build import AdamSettings, AdamW
from optim.loss_scale import LARGEST, LossScale, LossScaleSettings
from optim.masters import join, rounded, split
from user_error import UserError

ADAM = AdamSettings(beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_a_bf16_weight_and_its_remainder_are_every_finite_fp32(bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    master = master[master.isfinite()]
    weight, remainder = split(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))
    assert torch.equal(rounded(master, torch.bfloat16).view(torch.int16), weight.view(torch.int16)), "both forms train the same bf16"


def test_a_bf16_weight_is_the_nearest_and_ties_go_away_from_zero() -> None:
    def of(bits: int) -> int:
        master = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
        return int(split(master)[0].view(torch.int16)) & 0xFFFF

    assert of(0x3F807FFF) == 0x3F80 and of(0x3F808001) == 0x3F81
    assert of(0x3F808000) == 0x3F81 and of(0x3F818000) == 0x3F82, "round-to-even would send both ties to 3F82 and 3F80"
    assert of(0xBF808000) == 0xBF81


def test_with_round_to_even_two_masters_would_share_a_pair() -> None:
    """Why the rule is (bits + 0x8000) >> 16: below an even weight a tie leaves +0x8000, which 16 signed bits cannot tell from -0x8000."""
    ties = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32)
    even = ties.view(torch.float32).bfloat16().view(torch.int16).int()
    remainders = ties - (even << 16)
    assert not bool(((remainders >= -0x8000) & (remainders < 0x8000)).all())
    ours = split(ties.view(torch.float32))[1]
    assert ours.tolist() == [-0x8000, -0x8000]


def trained(
    form: str, *, steps: int, lr: float, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None
) -> tuple[AdamW, dict[str, Any]]:
    """An optimizer after ``steps`` updates with made-up gradients of two parameters, and those."""
    generator = torch.Generator().manual_seed(3)
    start = {"w": torch.randn(40, 33, generator=generator), "b": torch.randn(33, generator=generator)}
    parameters = {name: torch.nn.Parameter(torch.empty(value.shape, dtype=dtype)) for name, value in start.items()}
    optimizer = AdamW(parameters, ADAM, masters=form, device=device)  # type: ignore[arg-type]
    for name, value in start.items():
        optimizer.assign(name, value)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(lr)
    return optimizer, {name: torch.cat([master.read(piece) for piece in master.pieces()]) for name, master in optimizer.masters().items()}


def test_small_steps_are_not_lost_and_the_split_trains_the_bits_of_fp32_masters() -> None:
    (split_optimizer, in_split), (_, in_fp32), (_, fresh) = (
        trained("split", steps=50, lr=1e-5),
        trained("fp32", steps=50, lr=1e-5),
        trained("fp32", steps=0, lr=1e-5),
    )
    for name in in_fp32:
        assert torch.equal(in_split[name].view(torch.int32), in_fp32[name].view(torch.int32)), name
        assert (in_fp32[name] != fresh[name]).float().mean() > 0.99
    plain = torch.nn.Parameter(fresh["w"].bfloat16())
    adam = torch.optim.AdamW([plain], lr=1e-5, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        plain.grad = torch.randn(plain.shape, generator=generator).bfloat16()
        adam.step()
    assert (plain.detach() == fresh["w"].bfloat16()).float().mean() > 0.9, "plain bf16 stands still where 1e-5 is below half a step of it"
    assert sum(part.nbytes for part in split_optimizer.masters()["w"].parts) == 4 * 40 * 33


def test_masters_in_pieces_are_updated_as_a_whole_parameter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, of_fp32 = trained("split", steps=3, lr=1e-3)[1], trained("split", steps=3, lr=1e-3, dtype=torch.float32)[1]
    monkeypatch.setattr(masters, "PIECE_ELEMENTS", 256)
    pieces = trained("split", steps=3, lr=1e-3)[1]
    for name in whole:
        assert torch.equal(whole[name], pieces[name])
        torch.testing.assert_close(whole[name], of_fp32[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["split", "fp32"])
def test_the_parameter_is_its_master_rounded_and_takes_what_it_should(form: str, dtype: torch.dtype) -> None:
    optimizer, values = trained(form, steps=2, lr=1e-2, dtype=dtype)
    for name, master in optimizer.masters().items():
        parameter = optimizer._parameters[name]
        assert torch.equal(parameter.detach(), rounded(values[name], dtype).view(parameter.shape))
        beside = sum(part.nbytes for part in master.parts if part.data_ptr() != parameter.data_ptr())
        assert beside == parameter.numel() * (0 if dtype == torch.float32 else 2 if (form, dtype) == ("split", torch.bfloat16) else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masters_and_moments_that_lie_elsewhere_train_the_same_bits(dtype: torch.dtype) -> None:
    """--optimizer-offload: cpu:0 is not where parameters on "cpu" lie, as far as anybody asks."""
    here, there = (trained("fp32", steps=4, lr=1e-3, dtype=dtype, device=device) for device in (None, torch.device("cpu", 0)))
    assert all(torch.equal(here[1][name], there[1][name]) for name in here[1])
    for name, master in there[0].masters().items():
        assert not master.is_own and master.parts[0].dtype == torch.float32
        assert torch.equal(there[0]._parameters[name], here[0]._parameters[name])


def settings(**changes: Any) -> LossScaleSettings:
    return LossScaleSettings(**{"static": None, "initial": 32768.0, "window": 3, "minimum": 1.0, "hysteresis": 2, **changes})


def follow(scale: LossScale, overflows: str) -> list[float]:
    """The scale after each step: x overflowed, . did not."""
    values = []
    for overflow in overflows:
        scale.update(overflowed=overflow == "x")
        values.append(scale.value)
    return values


def test_the_loss_scale_halves_after_hysteresis_doubles_after_a_window_and_stays_within_its_bounds() -> None:
    scale = LossScale(settings())
    assert follow(scale, "xx") == [32768, 16384], "the first overflow is forgiven"
    assert follow(scale, "x..x") == [8192, 8192, 8192, 4096], "good steps in between do not restore the forgiveness"
    assert follow(scale, "...x") == [4096, 4096, 8192, 8192], "doubling does"
    low = LossScale(settings(initial=4.0, minimum=2.0, hysteresis=1))
    assert follow(low, "xxx") == [2, 2, 2] and low.is_at_minimum
    assert follow(LossScale(settings(initial=LARGEST, window=1)), "..") == [LARGEST, LARGEST]
    assert follow(LossScale(settings(static=512.0)), "xx....") == [512] * 6
    assert follow(LossScale(None), "x...") == [1] * 4


def test_a_loss_scale_goes_on_where_it_was_saved() -> None:
    whole, first = LossScale(settings()), LossScale(settings())
    follow(whole, "x..x..")
    follow(first, "x..x")
    resumed = LossScale(settings())
    resumed.load(first.state())
    assert follow(resumed, "..") == [whole.value] * 2 or resumed.state()["good_steps"] == whole.state()["good_steps"]
    assert {k: v for k, v in resumed.state().items() if k != "settings"} == {k: v for k, v in whole.state().items() if k != "settings"}
    lower = LossScale(settings(initial=2.0))
    lower.load(first.state())
    assert lower.value == 2, "another beginning is what a user asks for whose scale had to fall too far"
    clamped = LossScale(settings(minimum=20000.0))
    clamped.load(first.state())
    assert follow(clamped, "xx") == [20000, 20000], "an overflow never raises it"
    resumed.load(1.0)
    static = LossScale(settings(static=64.0))
    static.load(first.state())
    assert static.value == 64, "what is asked for now counts"
    with pytest.raises(UserError, match="loss scale cannot be read"):
        resumed.load({"value": "much"})


def test_8bit_adam_is_bitsandbytes_own_in_whatever_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from optim.eight_bit import EightBitAdamW

    generator = torch.Generator().manual_seed(1)
    start = {"large": torch.randn(70, 96, generator=generator), "small": torch.randn(50, 20, generator=generator)}
    gradients = [{name: torch.randn(value.shape, generator=generator) for name, value in start.items()} for _ in range(4)]
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    peer = bitsandbytes.optim.AdamW8bit(theirs.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    for step in gradients:
        for name, parameter in theirs.items():
            parameter.grad = step[name].clone()
        peer.step()
    for piece, dtype in ((2**22, torch.float32), (512, torch.bfloat16)):
        monkeypatch.setattr(masters, "PIECE_ELEMENTS", piece)
        ours = {name: torch.nn.Parameter(torch.empty(value.shape, dtype=dtype)) for name, value in start.items()}
        optimizer = AdamW(ours, ADAM, rule=EightBitAdamW(ADAM))
        for name, value in start.items():
            optimizer.assign(name, value)
        for step in gradients:
            for name, parameter in ours.items():
                parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
                parameter.grad = step[name].clone()
            optimizer.step(1e-2)
        found = {name: torch.cat([m.read(part) for part in m.pieces()]).view(start[name].shape) for name, m in optimizer.masters().items()}
        assert torch.equal(found["large"], theirs["large"].detach())
        torch.testing.assert_close(found["small"], theirs["small"].detach(), rtol=1e-5, atol=1e-6)  # fp32 moments, another kernel
        states = optimizer.state()
        assert states["large"]["exp_avg"].dtype == torch.uint8 and states["small"]["exp_avg"].dtype == torch.float32
        assert sum(t.nbytes for t in states["large"].values()) < 2.1 * start["large"].numel()


def test_the_state_of_an_optimizer_comes_back_bit_for_bit() -> None:
    one, _ = trained("split", steps=3, lr=1e-2)
    other, _ = trained("split", steps=0, lr=1e-2)
    other.load_state({name: {kind: tensor.clone() for kind, tensor in state.items()} for name, state in one.state().items()})
    for name, state in one.state().items():
        assert all(torch.equal(state[kind], other.state()[name][kind]) for kind in state)
        assert state["step"].item() == 3 and math.isfinite(state["exp_avg"].sum().item())
