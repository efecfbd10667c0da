"""What travels with weights: configuration, generation configuration and tokenizer, copied from folder to folder.

config.json gains the dtype of the weights beside it, under the key of transformers 5 (``dtype``) and that of 4.x (``torch_dtype``): a
wrong one would make every load convert, or round. A GPT-NeoX's rotary settings are written for both, too. The other files are copied
byte for byte.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import FileRecord, copy_file, write_json_file
from modules.gptneox import GPTNeoXConfig, both_rotary_forms

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_companions(folders: Sequence[Path], target: Path, *, dtypes: Iterable[torch.dtype]) -> list[FileRecord]:
    """Copy into ``target``: both configurations from the first folder, the tokenizer from the last one that has any (never mixed from two).

    ``dtypes``: those of the weights in ``target``; where they are mixed, config.json names the one that holds all without loss.
    """
    dtype = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    config = {**read_json_object(folders[0] / CONFIG), "dtype": dtype, "torch_dtype": dtype}
    if config.get("model_type") == GPTNeoXConfig.hf_model_type:
        config = both_rotary_forms(config)
    records = [write_json_file(target / CONFIG, config, relative_to=target)]
    if (folders[0] / GENERATION_CONFIG).is_file():
        records.append(copy_file(folders[0] / GENERATION_CONFIG, target / GENERATION_CONFIG, relative_to=target))
    tokenizers = [files for folder in folders if (files := tokenizer_files(folder))]
    for file in tokenizers[-1] if tokenizers else []:
        records.append(copy_file(file, target / file.name, relative_to=target))
    return records


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``; [] if it holds no tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
