"""Dropout whose noise is a function of where it falls, not of what was drawn before it.

The noise of a module in a micro-batch depends on (seed, optimizer step, name of the module, index of the micro-batch in the global batch)
alone: the same when a layer is computed again in the backward, after a resume, under any cut and any schedule; another one for every
replica, micro-batch, layer and module. A running stream of random numbers, which is what torch's own dropout draws from, gives none of
that. Promises: the noise depends neither on the dtype nor on the number of threads (torch draws serially on a CPU); the generators of
torch are left as they were. What is left to others: which step and micro-batch it is (training/). A CPU and a GPU draw different noise.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from modules.stage import Stage  # which holds what is defined here


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What noise is drawn for. step: of the optimizer; micro_batch: its index in the global batch, over replicas and accumulation steps."""

    seed: int
    step: int
    micro_batch: int

    def seed_of(self, name: str) -> int:
        """The seed of a generator for what ``name`` draws, in [0, 2**63). Of it a generator on a CPU reads the lower 32 bits."""
        digest = hashlib.blake2b(f"{self.seed}:{self.step}:{self.micro_batch}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class SeededDropout(nn.Module):
    """x * mask / (1 - p), mask Bernoulli(1 - p) (Srivastava et al. 2014, in the inverted form). Nothing happens for p = 0, in eval mode,
    or without a Draw. ``name``: the module's full path, see name_dropouts."""

    def __init__(self, p: float, name: str = "") -> None:
        super().__init__()
        assert 0 <= p < 1, f"a dropout probability is at least 0 and below 1, not {p}"
        self.p, self.name = p, name

    def forward(self, x: Tensor, draw: Draw | None) -> Tensor:
        """x (...) of any dtype. Returns the same shape and dtype; the backward keeps a byte for each element."""
        return _drop(x, self.p, self.seed(draw)) if draw is not None and self.is_active(draw) else x

    def is_active(self, draw: Draw | None) -> bool:
        """Whether anything is dropped."""
        return draw is not None and self.p > 0 and self.training

    def seed(self, draw: Draw, *where: int) -> int:
        """Of the generator that draws for this module, or for the part ``where`` of what it is given."""
        assert self.name, "a dropout draws under its name: call name_dropouts on the stage once it is built"
        return draw.seed_of(":".join([self.name, *map(str, where)]))

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"p={self.p}, name={self.name!r}"


def name_dropouts(module: nn.Module) -> None:
    """Tell every SeededDropout inside ``module`` its path from there. Called once a stage is built: its names are global."""
    for name, part in module.named_modules():
        if isinstance(part, SeededDropout):
            part.name = name


class CurrentDraw:
    """What the block that is being computed was called with, for modules inside it that are called with x alone."""

    def __init__(self) -> None:
        self.draw: Draw | None = None

    def follow(self, block: nn.Module) -> None:
        """From now on ``block`` notes its Draw here whenever it is called, also when a checkpoint computes it again."""
        block.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        segments = kwargs["segments"] if "segments" in kwargs else args[1]  # block(x, segments, rotary)
        self.draw = segments.draw


class AmbientDropout(nn.Module):
    """SeededDropout that finds its Draw in ``current``: it stands where the caller, peft's LoRA layer, gives no more than x."""

    def __init__(self, p: float, name: str, current: CurrentDraw) -> None:
        super().__init__()
        assert 0 <= p < 1, f"a dropout probability is at least 0 and below 1, not {p}"
        self.p, self.name, self.current = p, name, current

    def forward(self, x: Tensor) -> Tensor:
        """As SeededDropout."""
        draw = self.current.draw
        return x if draw is None or self.p == 0 or not self.training else _drop(x, self.p, draw.seed_of(self.name))

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"p={self.p}, name={self.name!r}"


def seed_lora_dropout(stage: "Stage") -> None:
    """Replace the nn.Dropout of every LoRA layer of ``stage`` by an AmbientDropout named by its path. Nothing to do twice.

    A LoRA layer is a module with a ModuleDict ``lora_dropout``, as peft makes them (there is an nn.Identity in it for a probability of 0).
    """
    current, num_found = CurrentDraw(), 0
    for name, part in list(stage.named_modules()):
        dropouts = getattr(part, "lora_dropout", None)
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        for adapter, dropout in list(dropouts.items()):
            if isinstance(dropout, nn.Dropout):
                ambient = AmbientDropout(dropout.p, f"{name}.lora_dropout.{adapter}", current)
                dropouts[adapter] = ambient.train(dropout.training)
                num_found += 1
    for block in stage.blocks.children() if num_found else ():
        current.follow(block)


@contextmanager
def torch_seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within, torch's own generator of ``device`` starts from ``seed``; afterwards it goes on where it was. For operations that draw and
    take no generator."""
    is_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
        # not torch.manual_seed: that seeds the generators of all devices, which are not put back
        generator = torch.default_generator if is_cpu else torch.cuda.default_generators[device.index]
        generator.manual_seed(seed)
        yield


def _drop(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return (x * mask).div_(1 - p)
