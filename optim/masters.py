"""The fp32 numbers behind the parameters: what the optimizer updates, and what a checkpoint must hold to go on exactly.

A parameter in half precision is too coarse to be updated (a step of 1e-5 vanishes beside a weight of 1), so the optimizer works on an fp32
master and the parameter is that, rounded. Three forms:

    own      an fp32 parameter is its own master
    fp32     the master lies beside the parameter (fp16, bf16, or fp32 on a device whose masters stay on the host)
    split    a bf16 parameter and a 16-bit remainder are the master: 4 bytes instead of 6, and no bit of it is lost

split: bf16 is the upper half of fp32. With ``bits`` the master's as a whole number, the parameter's are ``(bits + 0x8000) >> 16`` (ties go
away from zero) and the remainder is ``bits - (parameter << 16)``, from -0x8000 to 0x7fff. Round-to-even would not do: the two neighbours of
a tie then share a pair. The fp32 form rounds to bf16 by the same rule, so both train the same bits.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

MasterForm = Literal["fp32", "split"]

PIECE_ELEMENTS = 2**22  # of a parameter that are updated at a time; a multiple of every block of an 8-bit state


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16, int16 remainder) of the same shape. Infinite and nan masters have no remainder: an update that would make them is
    skipped."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The reverse of split(): fp32, every bit."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp32 master as a parameter of ``dtype``; to bf16 as split() rounds, else to the nearest, ties to even."""
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16) if dtype == torch.bfloat16 else master.to(dtype)


class Master:
    """The fp32 values of one parameter, in the form that ``parts`` shows: (fp32,) or (bf16, int16)."""

    def __init__(self, parameter: nn.Parameter, form: MasterForm, *, device: torch.device | None = None) -> None:
        """device: where the master lies and is updated; None: beside the parameter. Values are undefined until assign()."""
        self._parameter = parameter
        home = parameter.device if device is None else device
        self._is_split = form == "split" and parameter.dtype == torch.bfloat16 and home == parameter.device
        self.is_own = parameter.dtype == torch.float32 and home == parameter.device
        self._beside: Tensor | None = None
        if not self.is_own:
            dtype = torch.int16 if self._is_split else torch.float32
            self._beside = torch.empty(
                parameter.shape, dtype=dtype, device=home, pin_memory=home.type == "cpu" and parameter.device.type == "cuda"
            )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold the values, for a copy: compose() of them is the master."""
        if self._beside is None:
            return (self._parameter.detach(),)
        return (self._parameter.detach(), self._beside) if self._is_split else (self._beside,)

    @property
    def bytes_beside(self) -> int:
        """Of memory, on ``device``, beside the parameter itself."""
        return 0 if self._beside is None else self._beside.nbytes

    @staticmethod
    def compose(*parts: Tensor) -> Tensor:
        """The master, fp32, from its ``parts``."""
        return parts[0] if len(parts) == 1 else join(*parts)

    @property
    def device(self) -> torch.device:
        """Where updates are computed."""
        return self.parts[-1].device

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Take over ``values`` (any floating dtype, any device), and round the parameter from them."""
        for piece in self.pieces():
            self.write(piece, values.reshape(-1)[piece].to(device=self.device, dtype=torch.float32))

    def pieces(self) -> Iterator[slice]:
        """Of the flattened parameter, in order; the same in every form, so that all compute the same bits."""
        for start in range(0, self._parameter.numel(), PIECE_ELEMENTS):
            yield slice(start, min(start + PIECE_ELEMENTS, self._parameter.numel()))

    def read(self, piece: slice) -> Tensor:
        """(n,) fp32 on ``device``: a view to be changed in place, or a copy; either way write() it back."""
        return self.compose(*(part.view(-1)[piece] for part in self.parts))

    @torch.no_grad()
    def write(self, piece: slice, values: Tensor) -> None:
        """values (n,) fp32 on ``device``: become the master, and rounded the parameter."""
        parameter = self._parameter.detach().view(-1)[piece]
        if self._beside is None:
            parameter.copy_(values)
        elif self._is_split:
            weight, remainder = split(values)
            parameter.copy_(weight)
            self._beside.view(-1)[piece].copy_(remainder)
        else:
            self._beside.view(-1)[piece].copy_(values)
            parameter.copy_(rounded(values, parameter.dtype))
