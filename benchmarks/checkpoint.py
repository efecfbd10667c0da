"""What a checkpoint costs: how long training stands still, how fast the bytes reach the disk, what memory the copy takes; against cp and
torch.distributed.checkpoint on the same tensors and the same disk.

    python benchmarks/checkpoint.py --rounds 3 > checkpoint.json          (about 6 minutes; --quick: a smoke run of seconds)

One rank of the trainer's own Saver, with weights and AdamW states of a GPT-J (--width, --layers, --vocab), in a process of its own per
contestant and round, in an order that turns. Every save ends with fsync; what was saved is removed before the next. Before each the
machine's free memory is touched: a hypervisor that has taken it back would make whoever needs it first wait for seconds. Contestants:

    ours async           training stands still for a copy, which a thread writes; the first copy also makes its room in memory
    ours sync            training stands still until the step is renamed; then cp -r of that folder and fsync of each file
    dcp.save             torch.distributed.checkpoint, one writing thread (its default), and one per core
    dcp.async_save       with the stager it makes for each save (its default), and with one that keeps its memory

Values are one block of random numbers again and again: neither disk nor sha256 looks at them."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from bench import Sizes, answer_and_end, machine, peak_rss_mib, run_in_own_process, run_rounds, spread

CONTESTANTS = ("ours async", "ours sync", "dcp.save", "dcp.save, a thread per core", "dcp.async_save", "dcp.async_save, room kept")
FULL = Sizes(width=1600, layers=12, vocab=8192)
QUICK = Sizes(width=256, layers=4, vocab=1024)
TOUCHED_SHARE = 0.8  # of the memory that is free
COPIES_IN_MEMORY = 3  # the state, its copy, and the file on its way to the disk
GOAL_STALL = 0.2  # of a synchronous save
ROOM_S = 8.0  # of training between the first update and the first save, in which the room for the copy is made


def run_contestant(name: str, sizes: Sizes, disk: Path, num_saves: int) -> dict[str, Any]:
    """In a process of its own: seconds of each save, by what they are of."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    stage, optimizer = drawn_state(sizes)
    tensors = state_dict_of(stage, optimizer)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    saves = {"ours": our_saves, "dcp.save": dcp_saves, "dcp.async_save": dcp_async_saves}[name.split(",")[0].split(" ")[0]]
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        before = peak_rss_mib()
        state = SimpleNamespace(sizes=sizes, stage=stage, optimizer=optimizer, tensors=tensors, num_bytes=num_bytes)
        seconds = saves(name, state, Path(folder), num_saves)
        return {"gb": num_bytes / 1e9, "peak_rss_over_base_mib": peak_rss_mib() - before, "base_rss_mib": before, **seconds}


def drawn_state(sizes: Sizes):  # type: ignore[no-untyped-def]
    """A whole model as one stage, and AdamW as behind an update."""
    import torch

    from modules.gptj import GPTJConfig
    from modules.stage import empty_stage
    from optim.build import AdamSettings, AdamW

    stage = empty_stage(GPTJConfig.from_hf(sizes.hf_config), 0, sizes.layers)
    block = torch.randn(1 << 20)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        for part in tensor.detach().view(-1).split(len(block)):
            part.copy_(block[: len(part)])
        return tensor

    named = dict(stage.named_parameters())
    optimizer = AdamW(named, AdamSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01))
    moments = {
        name: {"step": torch.tensor(1.0), "exp_avg": fill(torch.empty_like(p)), "exp_avg_sq": fill(torch.empty_like(p))}
        for name, p in ((name, fill(p).detach()) for name, p in named.items())
    }
    optimizer.load_state(moments)
    return stage, optimizer


def state_dict_of(stage, optimizer) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """The tensors that ours saves, as the peer takes them."""
    moments = {f"{kind}/{name}": tensor for name, state in optimizer.state().items() for kind, tensor in state.items()}
    return {**{name: parameter.detach() for name, parameter in stage.named_parameters()}, **moments}


def our_saves(name: str, state: SimpleNamespace, folder: Path, num_saves: int) -> dict[str, list[float]]:
    """The trainer's Saver with a job of one rank."""
    from checkpoint.manifest import verify_step
    from training.checkpoints.save_options import SaveOptions
    from training.checkpoints.saver import Saver
    from training.checkpoints.shared_folders import Folders

    is_async = name == "ours async"
    seconds: dict[str, list[float]] = {"stall": [], "until_written": []} if is_async else {"save": [], "cp": []}
    options = SaveOptions(is_async=is_async, with_optimizer=True, keep=0)
    root = folder / "run"
    root.mkdir()
    saver = Saver(job_of_one(folder, state.sizes), Folders(groups=((0,),)), root, state.stage, state.optimizer, options, folder)
    saver.prepare()  # as the trainer does after its first update; the steps before the first save hide it
    time.sleep(ROOM_S)
    for step in range(num_saves):
        settle(state.num_bytes)
        started = time.perf_counter()
        stall = saver.save(step, step, {})
        saver.finish()
        if is_async:
            seconds["stall"].append(stall)
            seconds["until_written"].append(time.perf_counter() - started)
        else:
            seconds["save"].append(stall)
        assert verify_step(root / str(step)) == []
        if not is_async:
            settle(state.num_bytes)
            seconds["cp"].append(seconds_of(lambda step=step: copy_and_flush(root / str(step), folder / "copy")))
            shutil.rmtree(folder / "copy")
        shutil.rmtree(root / str(step))
    return seconds


def job_of_one(folder: Path, sizes: Sizes):  # type: ignore[no-untyped-def]
    """As much of a job as Saver looks at."""
    import torch.distributed as dist

    from checkpoint.model_folder import ModelFolder
    from comms.place import place_of

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(sizes.hf_config))
    return SimpleNamespace(
        place=place_of(0, dp_size=1, pp_size=1),
        store=dist.PrefixStore("job", dist.TCPStore("127.0.0.1", 0, is_master=True)),
        roster=[{"host": "here", "host_id": "here"}],
        model=ModelFolder.open_config(model),
        cut=((0, sizes.layers),),
        num_threads=len(os.sched_getaffinity(0)),
    )


def copy_and_flush(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in (*(p for p in target.rglob("*") if p.is_file()), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def dcp_saves(name: str, state: SimpleNamespace, folder: Path, num_saves: int) -> dict[str, list[float]]:
    """torch.distributed.checkpoint.save with fsync, as it does by default."""
    import torch.distributed.checkpoint as dcp

    threads = len(os.sched_getaffinity(0)) if "core" in name else 1
    seconds = []
    with process_group_of_one():
        for step in range(num_saves):
            settle(state.num_bytes)
            writer = dcp.FileSystemWriter(folder / str(step), thread_count=threads)
            seconds.append(seconds_of(lambda writer=writer: dcp.save(state.tensors, storage_writer=writer)))
            shutil.rmtree(folder / str(step))
    return {"save": seconds}


def dcp_async_saves(name: str, state: SimpleNamespace, folder: Path, num_saves: int) -> dict[str, list[float]]:
    """torch.distributed.checkpoint.async_save on a thread, as it does by default; a CPU has nothing to pin or to overlap."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False)) if "room kept" in name else None
    seconds: dict[str, list[float]] = {"stall": [], "until_written": []}
    with process_group_of_one():
        for step in range(num_saves):
            settle(state.num_bytes)
            started = time.perf_counter()
            writer = dcp.FileSystemWriter(folder / str(step))
            future = dcp.async_save(state.tensors, storage_writer=writer, async_stager=stager)
            seconds["stall"].append(time.perf_counter() - started)
            future.result()
            seconds["until_written"].append(time.perf_counter() - started)
            del future
            shutil.rmtree(folder / str(step))
    return seconds


@contextmanager
def process_group_of_one():  # type: ignore[no-untyped-def]
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settle(num_bytes: int) -> None:
    """Nothing left over to be written, and memory for a copy and for a file's pages that the machine really has."""
    os.sync()
    size = min(2 * num_bytes, int(TOUCHED_SHARE * psutil.virtual_memory().available))
    touch = (
        f"import mmap; m = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nfor i in range(0, {size}, 4096): m[i] = 1"
    )
    subprocess.run([sys.executable, "-S", "-c", touch], check=True)  # elsewhere, so that it does not count as this one's memory


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def sizes_that_fit(sizes: Sizes) -> Sizes:
    """Fewer layers, where memory does not hold the state, its copy and the files on their way to the disk."""
    import torch

    from modules.gptj import GPTJConfig
    from training.job.host_limits import default_memory_limit
    from training.memory.held import count_parameters

    counts = count_parameters(GPTJConfig.from_hf(sizes.hf_config))
    per_parameter = 3 * 4 * COPIES_IN_MEMORY  # fp32 weight and two moments
    room = default_memory_limit(torch.device("cpu"), 1) // per_parameter - counts.embeddings - counts.head
    layers = max(1, min(sizes.layers, room // counts.layer))
    if layers < sizes.layers:
        print(f"{layers} of {sizes.layers} layers fit into memory", file=sys.stderr)
    return replace(sizes, layers=layers)


def figures_of(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [found[name] for found in rounds]
    size = runs[0]["gb"]
    report: dict[str, Any] = {"peak_rss_over_base_mib": spread(run["peak_rss_over_base_mib"] for run in runs)}
    for kind in ("save", "cp", "until_written"):
        if kind in runs[0]:
            report[f"{kind}_s"] = spread(s for run in runs for s in run[kind])
            report[f"{kind}_mb_per_s"] = spread(size * 1e3 / s for run in runs for s in run[kind])
    if "stall" in runs[0]:
        report["stall_s_first"] = spread(run["stall"][0] for run in runs)
        report["stall_s_later"] = spread(s for run in runs for s in run["stall"][1:])
    return report


def ratios_of(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of medians, within a round."""

    def ratio(ours: Callable[[dict[str, Any]], float], theirs: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return spread(ours(found) / theirs(found) for found in rounds)

    def median(name: str, kind: str) -> Callable[[dict[str, Any]], float]:
        return lambda found: statistics.median(found[name][kind])

    def first(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda found: float(found[name]["stall"][0])

    def later(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda found: statistics.median(found[name]["stall"][1:])

    sync = median("ours sync", "save")
    ratios = {
        "stall async (first) / seconds sync": ratio(first("ours async"), sync),
        "stall async (later) / seconds sync": ratio(later("ours async"), sync),
        "MB/s ours / cp": ratio(median("ours sync", "cp"), sync),
    }
    for peer in (name for name in CONTESTANTS if name.startswith("dcp.save")):
        ratios[f"MB/s ours / {peer}"] = ratio(median(peer, "save"), sync)
    for peer in (name for name in CONTESTANTS if name.startswith("dcp.async_save")):
        ratios[f"stall ours / {peer} (first)"] = ratio(first("ours async"), first(peer))
        ratios[f"stall ours / {peer} (later)"] = ratio(later("ours async"), later(peer))
        ratios[f"seconds until written, ours / {peer}"] = ratio(median("ours async", "until_written"), median(peer, "until_written"))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3, help="per process; the first one is reported apart")
    parser.add_argument("--width", type=int, default=FULL.width)
    parser.add_argument("--layers", type=int, default=FULL.layers)
    parser.add_argument("--vocab", type=int, default=FULL.vocab)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk that is written to")
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument("--variant", help="for the benchmark's own processes")
    options = parser.parse_args()
    if options.variant:
        asked = json.loads(options.variant)
        given = asked["given"]
        answer_and_end(run_contestant(asked["kind"], Sizes(**asked["sizes"]), Path(given["disk"]), given["saves"]))
    assert options.saves >= 2, "the first save and later ones are reported apart"
    sizes = QUICK if options.quick else sizes_that_fit(replace(FULL, width=options.width, layers=options.layers, vocab=options.vocab))
    before, given = machine(), {"disk": str(options.disk), "saves": options.saves}
    num_rounds = 1 if options.quick else options.rounds
    rounds = run_rounds(list(CONTESTANTS), lambda name: run_in_own_process(__file__, name, given, sizes), num_rounds)
    ratios = ratios_of(rounds)
    report = {
        "benchmark": "checkpoint",
        "sizes": {"width": sizes.width, "layers": sizes.layers, "vocab": sizes.vocab, "gb": rounds[0]["ours sync"]["gb"], **given},
        "machine": {**before, "load_after": os.getloadavg()[0], "uptime": Path("/proc/uptime").read_text().split()[0]},
        "goal": {"stall async / seconds sync at most": GOAL_STALL},
        "ratios": ratios,
        "contestants": {name: figures_of(name, rounds) for name in CONTESTANTS},
        "seconds": [{name: {k: v for k, v in run.items() if isinstance(v, list)} for name, run in found.items()} for found in rounds],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
