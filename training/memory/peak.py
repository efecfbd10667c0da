"""What a stage took of memory at most, to be held against what training/memory/prediction.py said it would."""

import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """What a stage took at most, to be held against its prediction. On CUDA: the allocator's peak. On a CPU: the process's peak of resident
    memory less what it had at start(), so start before the stage is built, and with everything imported (predict first: that imports what
    the stage will need). Where the system cannot reset its peak (no Linux, or a sandbox), the peak is that since the process began."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def start(self) -> None:
        """Count from now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: VmHWM begins anew at VmRSS
        except OSError:
            self._before = _peak_resident_bytes()
            return
        self._before = _peak_resident_bytes()

    def bytes(self) -> int:
        """The most since start(), above what was there then."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _peak_resident_bytes() - self._before


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
