"""The head and its loss, forward and backward: ours in chunks against whole logits and against torch's linear_cross_entropy.

    python benchmarks/head.py > head.json

Each round times every contestant once, in an order that turns; what is reported are ratios within a round (median, minimum, maximum over
the rounds). "naive" forms all logits and gives them to F.cross_entropy in fp32, as transformers does; "torch" is linear_cross_entropy with
its default chunks. Peak bytes are those that the allocator had given out at once beyond what lay there before (the gradients that remain
included); oneDNN's own scratch memory is not seen. Errors are relative, against float64 on the same rounded inputs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from bench import machine, run_rounds, spread
from torch import Tensor

from modules.lm_ops import IGNORED_TARGET, chunked_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """hidden (N, C), weight (V, C), bias (V,), targets (N,): leaves, whose gradients are formed where they are wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor

    @property
    def scale(self) -> float:
        return 1 / int((self.targets != IGNORED_TARGET).sum())

    def run(self, loss: Loss) -> tuple[Tensor, ...]:
        """The loss and the gradients that are wanted."""
        y = loss(self.hidden, self.weight, self.bias, self.targets, self.scale)
        wanted = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf.requires_grad]
        return y.detach(), *torch.autograd.grad(y, wanted)

    def in_float64(self) -> "Problem":
        """The same numbers."""
        leaves = {name: getattr(self, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
        return Problem(targets=self.targets, **leaves)


def draw_problem(
    *, rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu", is_trained: bool = True
) -> Problem:
    """Hidden states as behind a LayerNorm, logits of a spread of about 2, every seventh row without a target. is_trained: weight and bias
    want gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(std).to(device, dtype)

    targets = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    targets[::7] = IGNORED_TARGET
    return Problem(
        hidden=drawn(rows, width, std=1.0).requires_grad_(),
        weight=drawn(vocab, width, std=2 / width**0.5).requires_grad_(is_trained),
        bias=drawn(vocab, std=0.5).requires_grad_(is_trained),
        targets=targets,
    )


def naive(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float) -> Tensor:
    """All logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET) * scale


def torch_chunked(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float) -> Tensor:
    """torch's own, in the chunks it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="sum", options=options) * scale


CONTESTANTS: dict[str, Loss] = {"chunked": chunked_cross_entropy, "naive": naive, "torch": torch_chunked}


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most that the allocator had given out at once while ``work`` ran, beyond what it had before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()  # what it returns is to be freed after the recording
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["args"]["Ev Idx"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def time_once(problem: Problem, loss: Loss) -> float:
    """Seconds of a forward and backward."""
    is_cuda = problem.hidden.is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    problem.run(loss)
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def relative_errors(problem: Problem, references: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """By contestant: of the loss and of each gradient that is wanted, the hidden states' first."""
    errors = {}
    for name, loss in CONTESTANTS.items():
        values = problem.run(loss)
        parts = ("loss", "grad_hidden", "grad_weight", "grad_bias")[: len(values)]
        errors[name] = {
            part: float((value.double() - reference).norm() / reference.norm())
            for part, value, reference in zip(parts, values, references, strict=False)
        }
    return errors


def measure(options: argparse.Namespace, dtype: torch.dtype, *, is_trained: bool) -> dict[str, Any]:
    """Everything about one dtype, for a head that is trained or frozen."""
    problem = draw_problem(
        rows=options.rows, width=options.width, vocab=options.vocab, dtype=dtype, device=options.device, is_trained=is_trained
    )
    errors = relative_errors(problem, problem.in_float64().run(naive))  # also the runs that are not timed
    rounds = run_rounds(list(CONTESTANTS), lambda name: time_once(problem, CONTESTANTS[name]), options.rounds)
    return {
        "speed of chunked against": {
            peer: spread(seconds[peer] / seconds["chunked"] for seconds in rounds) for peer in CONTESTANTS if peer != "chunked"
        },
        "peak_bytes": {name: peak_bytes(lambda loss=loss: problem.run(loss), options.device) for name, loss in CONTESTANTS.items()},  # type: ignore[misc]
        "relative_error": errors,
        "seconds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50400)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.width, options.vocab, options.rounds = 512, 128, 8192, 1
    torch.set_num_threads(options.threads)
    before = machine()
    report = {
        "benchmark": "head",
        "sizes": {name: getattr(options, name) for name in ("rows", "width", "vocab", "device", "threads")},
        **before,
        **{
            f"{name}, {'trained' if is_trained else 'frozen'}": measure(options, DTYPES[name], is_trained=is_trained)
            for name in options.dtypes
            for is_trained in (True, False)
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
