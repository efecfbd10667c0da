"""How fast and with how much memory models are converted, against `cp` and fsync of as many bytes on the same disk.

    python benchmarks/convert.py > convert.json            about 1 GB; --megabytes 4000 for more, --quick to see whether it runs

Cases: ``layers``, fp32 safetensors into our folder, each dtype kept (the target: at least 0.8 of cp); ``layers-from-bin``, an fp16 .bin
into our folder; ``hf``, our folder into a Hugging Face folder. Each is measured in rounds, ours and cp in turning order, each in a process
of its own: the seconds are those between the end of its imports and the last fsync, for cp those of `cp` and of an fsync of each copy. The
ratio is that of the medians.

Both read from the page cache. Each is done twice at once, and only the second time counts, after the first result was deleted and the disk
synchronised: it finds the source cached and writes into memory that was just freed. A virtual machine gives memory that has been free
for seconds back to its host, and then a page costs far more the first time (8 us seen, 2 s per GB), whoever comes upon it.

Peak memory: VmHWM after the conversion less VmRSS before it, mapped pages included."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import Sizes, machine, run_rounds, spread

CASES = ("layers", "layers-from-bin", "hf")
LAYERS = 8


def sizes_for(num_bytes: int) -> Sizes:
    """A model of LAYERS layers with about ``num_bytes`` of fp32 weights, a quarter of them embeddings and head, as in small models."""
    width = next(w for w in range(64, 1 << 16, 64) if 4 * (12 * w * w * LAYERS) >= 0.75 * num_bytes)
    return Sizes(width=width, layers=LAYERS, vocab=max(64, int(num_bytes / 4 * 0.25 / (2 * width))), seq_length=64)


def make_source(case: str, sizes: Sizes, folder: Path) -> None:
    """Random weights in the case's layout, and a config.json."""
    import torch
    from safetensors.torch import save_file

    from checkpoint.layered_folder import write_model_folder
    from checkpoint.model_folder import ModelFolder
    from modules.families import read_model_config
    from modules.stage import meta_stage

    config = read_model_config(sizes.hf_config)
    shapes = {name: tensor.shape for name, tensor in meta_stage(config, 0, sizes.layers).state_dict().items()}
    dtype = torch.float16 if case == "layers-from-bin" else torch.float32
    plain = folder.with_name(f"{folder.name}-plain") if case == "hf" else folder
    plain.mkdir(parents=True)
    (plain / "config.json").write_text(json.dumps(sizes.hf_config))
    weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    if case == "layers-from-bin":
        torch.save(weights, plain / "pytorch_model.bin")
    else:
        save_file(weights, plain / "model.safetensors")
    if case == "hf":
        write_model_folder(ModelFolder.open(plain), folder, config)
        shutil.rmtree(plain)


def convert(case: str, source: Path, target: Path) -> dict[str, float]:
    """Convert, in this process; seconds and bytes."""
    from checkpoint.hf_folder import write_hf_folder
    from checkpoint.layered_folder import write_model_folder
    from checkpoint.model_folder import ModelFolder
    from modules.families import read_model_config

    def run() -> None:
        folder = ModelFolder.open(source)
        config = read_model_config(folder.config)
        if case == "hf":
            write_hf_folder(folder, target, config, max_shard_bytes=5 * 10**9)
        else:
            write_model_folder(folder, target, config)

    run()  # also has torch import what it needs for shapes without storage (sympy ...), which takes a second
    delete(target)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # forget the peak of the past
    base, started = memory_bytes("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    folder = ModelFolder.open(source)
    largest = max(folder.weights[name].spec.num_bytes for name in folder.names())
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - base, "largest_tensor_bytes": largest}


def copy(source: Path, target: Path) -> dict[str, float]:
    """cp of the files of weights, then fsync of each."""
    files = [file for file in sorted(source.iterdir()) if file.suffix in (".safetensors", ".bin")]

    def run() -> None:
        target.mkdir(parents=True)
        subprocess.run(["cp", *files, target], check=True)
        for file in files:
            descriptor = os.open(target / file.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    run()
    delete(target)
    started = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started}


def delete(target: Path) -> None:
    """Remove what was written, with nothing left to be written back."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()


def memory_bytes(field: str) -> int:
    """Of this process: a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(case: str, what: str, source: Path, target: Path) -> dict[str, float]:
    """One conversion or copy, in a process of its own."""
    delete(target)
    if what == "cp":
        return copy(source, target)
    order = json.dumps({"case": case, "source": str(source), "target": str(target)})
    done = subprocess.run([sys.executable, __file__, "--convert", order], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(rounds: list[dict[str, dict[str, float]]], num_bytes: int) -> dict[str, Any]:
    """What is reported of a case."""
    seconds = {what: [one[what]["seconds"] for one in rounds] for what in ("ours", "cp")}
    peak, largest = max(one["ours"]["peak_bytes"] for one in rounds), rounds[0]["ours"]["largest_tensor_bytes"]
    return {
        "bytes": num_bytes,
        "ratio_to_cp": statistics.median(seconds["cp"]) / statistics.median(seconds["ours"]),
        "seconds": {what: spread(values) for what, values in seconds.items()},
        "mb_per_s": {what: num_bytes / 1e6 / statistics.median(values) for what, values in seconds.items()},
        "peak_mb_over_base": peak / 1e6,
        "largest_tensor_mb": largest / 1e6,
        "peak_in_largest_tensors": peak / largest,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Conversion against cp and fsync; JSON on stdout.")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the fp32 model (default 1000)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder; its disk is measured (default: the system's)")
    parser.add_argument("--quick", action="store_true", help="20 MB, 2 rounds: to see whether it runs")
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 20, 2
    return options


def main() -> None:
    """Measure all cases, or (in a process of its own) do one conversion."""
    options = parse_arguments()
    if options.convert:
        order: Mapping[str, str] = json.loads(options.convert)
        print(json.dumps(convert(order["case"], Path(order["source"]), Path(order["target"]))))
        return
    facts, sizes, cases = machine(), sizes_for(options.megabytes * 10**6), {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for case in options.cases:
            source, target = Path(scratch, case, "source"), Path(scratch, case, "target")
            child = os.fork()  # so that the memory of what is drawn is not this process's
            if child == 0:
                make_source(case, sizes, source)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, "the source could not be made; the error stands above"
            num_bytes = sum(file.stat().st_size for file in source.iterdir() if file.suffix in (".safetensors", ".bin"))
            run = partial(measure, case, source=source, target=target)
            rounds = run_rounds(("ours", "cp"), run, options.rounds)
            cases[case] = summary(rounds, num_bytes)
            shutil.rmtree(Path(scratch, case))
    load_after = os.getloadavg()[0]
    print(json.dumps({"machine": {**facts, "load_after": load_after}, "rounds": options.rounds, "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
