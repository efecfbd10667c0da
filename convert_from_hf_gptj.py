"""Cut a Hugging Face GPT-J into the layer-sharded model folder that the trainer's ranks load their own layers from.

    python convert_from_hf_gptj.py --model-name EleutherAI/gpt-j-6B --save-dir pretrained

The result is a Hugging Face folder too: ``from_pretrained`` reads it. The trainer also takes the original folder as it is; cutting it
once spares every later start from reading ``.bin`` files, and proves that the model is whole before any machine is rented for it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from tqdm import tqdm

    from checkpoint.atomic_folder import check_target
    from checkpoint.companions import tokenizer_files
    from checkpoint.layered_folder import write_model_folder
    from checkpoint.model_folder import ModelFolder, check_model_folder, resolve_model_folder
    from modules.gptj import GPTJConfig
    from user_error import UserError
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cut a Hugging Face GPT-J into one file per layer, for dist_clm_train.py.")
    parser.add_argument("--model-name", required=True, help="local Hugging Face folder (or one of our own), or a name on the hub")
    parser.add_argument("--save-dir", required=True, type=Path, help="folder to write into, as SAVE_DIR/<model name with / as _>")
    return parser.parse_args(argv)


def target_folder(model_name: str, save_dir: Path) -> Path:
    """``save_dir``/<hub name with / as _>, or for a local folder <its last path component>."""
    if Path(model_name).expanduser().is_dir():
        return save_dir / Path(os.path.abspath(Path(model_name).expanduser())).name
    return save_dir / model_name.replace("/", "_")


def convert(model_name: str, save_dir: Path) -> None:
    """The whole job; raises UserError for whatever the user can cure, and then has written nothing."""
    target = target_folder(model_name, save_dir.expanduser())
    check_target(target)  # before anything is downloaded
    source = ModelFolder.open(resolve_model_folder(model_name))
    config = GPTJConfig.from_hf(source.config)
    check_model_folder(source, config)
    with tqdm(total=source.num_bytes(), unit="B", unit_scale=True, desc="layers") as bar:

        def show(key: str, num_bytes: int) -> None:
            bar.set_postfix_str(key, refresh=False)
            bar.update(num_bytes)

        write_model_folder(source, target, config, show)
    if not tokenizer_files(source.path):
        print(f"note: {source.path} holds no tokenizer, so {target} holds none either: give the trainer --tokenizer-name")
    size = f"{len(source.names())} tensors, {source.num_bytes() / 1e9:.3f} GB"
    print(f"wrote {target}: {config.num_layers} layers, embeddings and head, {size}")
    print("next, once per device, with that device's rank R of N:")
    print(
        f"  python dist_clm_train.py --model-name {target} --task-name DATA.jsonl --checkpoint-path model_checkpoints/{target.name} "
        "--total-steps STEPS --dist-url tcp://HOST:PORT --world-size N --rank R --pipeline-group-size STAGES --data-group-size REPLICAS"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        convert(arguments.model_name, arguments.save_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
