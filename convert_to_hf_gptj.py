"""Turn a training checkpoint (or a layer-sharded model folder) into a plain Hugging Face folder, ready to load, publish or serve.

    python convert_to_hf_gptj.py --ckpt-path checkpoints/my-run --save-path my-model

Every checkpoint can be loaded with ``from_pretrained`` as it lies; this leaves the training state behind and uses the usual file names.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from tqdm import tqdm

    from checkpoint.atomic_folder import PARTIAL_SUFFIX, check_target
    from checkpoint.companions import CONFIG, tokenizer_files
    from checkpoint.hf_folder import write_hf_folder
    from checkpoint.manifest import MANIFEST, TRAIN_STATE, find_newest_step, step_folders, verify_step
    from checkpoint.model_folder import ModelFolder, check_model_folder
    from modules.gptj import GPTJConfig
    from user_error import UserError
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn a checkpoint into a plain Hugging Face folder.")
    source_help = "a step's folder, a model folder, or a --checkpoint-path (its newest complete step is taken)"
    parser.add_argument("--ckpt-path", required=True, type=Path, help=source_help)
    parser.add_argument("--save-path", required=True, type=Path, help="folder to write; must be missing or empty")
    parser.add_argument("--n-stages", type=int, help="pipeline stages of the training; only checked")
    parser.add_argument("--n-layer-per-stage", type=int, help="layers per stage of it; only checked")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="bytes per file, as a number with KB, MB, GB, KiB, MiB or GiB (default 5GB)"
    )
    return parser.parse_args(argv)


def parse_size(text: str) -> int:
    """'5GB' -> 5_000_000_000. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size must be a positive number of bytes such as 5GB or 500MB; it is {text!r}")
    return size


def check_coverage(num_layers: int, num_stages: int | None, layers_per_stage: int | None) -> None:
    """Raise UserError if the two numbers are given and do not describe a cut of this model in which every stage has a layer."""
    if num_stages is None and layers_per_stage is None:
        return
    if num_stages is None or layers_per_stage is None:
        raise UserError("--n-stages and --n-layer-per-stage are checked together: give both or neither (they are not needed)")
    given = f"--n-stages {num_stages} --n-layer-per-stage {layers_per_stage}"
    cure = "Correct the numbers or leave both out."
    if num_stages < 1 or layers_per_stage < 1 or num_stages * layers_per_stage < num_layers:
        raise UserError(f"the stages must cover all {num_layers} layers of this model, and {given} do not. {cure}")
    if (num_stages - 1) * layers_per_stage >= num_layers:
        raise UserError(f"every stage must hold a layer, and the {num_layers} layers of this model end early with {given}. {cure}")


def find_source(path: Path) -> Path:
    """The folder to convert: ``path`` itself, or the newest complete step in it. Raises UserError if it is neither or not complete."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give a step's folder, a model folder or a --checkpoint-path.")
    if (path / MANIFEST).exists() or (path / TRAIN_STATE).exists() or path.name.endswith(PARTIAL_SUFFIX):
        problems = verify_step(path) or verify_step(path, hashes=True, only=[entry.name for entry in path.iterdir()])
        if problems:
            raise UserError(f"{path} is no complete checkpoint: {'; '.join(problems[:5])}. Take an older step.")
        return path
    if (path / CONFIG).exists():
        return path
    newest, warnings = find_newest_step(path)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if newest is None:
        seen = "none of its step folders is complete" if step_folders(path) else "it holds neither config.json nor step folders"
        raise UserError(f"{path} holds no checkpoint to convert: {seen}. Give a step's folder, a model folder or a --checkpoint-path.")
    print(f"taking the newest complete step: {newest}")
    return newest


def convert(arguments: argparse.Namespace) -> None:
    """The whole job; raises UserError for whatever the user can cure, and then has written nothing."""
    max_shard_bytes = parse_size(arguments.max_shard_size)
    target = arguments.save_path.expanduser()
    check_target(target)
    source = ModelFolder.open(find_source(arguments.ckpt_path.expanduser()))
    config = GPTJConfig.from_hf(source.config)
    check_coverage(config.num_layers, arguments.n_stages, arguments.n_layer_per_stage)
    check_model_folder(source, config)
    with tqdm(total=source.num_bytes(), unit="B", unit_scale=True, desc="weights") as bar:
        files = write_hf_folder(source, target, config, max_shard_bytes=max_shard_bytes, progress=bar.update)
    if not tokenizer_files(source.path):
        print(f"note: {source.path} holds no tokenizer, so {target} holds none either")
    print(f"wrote {target}: {len(source.names())} tensors in {len(files)} file(s), {source.num_bytes() / 1e9:.3f} GB")
    print("next:")
    print(f"""  python -c 'from transformers import pipeline; print(pipeline("text-generation", "{target}")("Hello"))'""")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        convert(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
