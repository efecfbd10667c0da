"""From --tokenizer-name and --task-name to the reader of tokens, on rank 0, and what of them a resume must find unchanged."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.model_folder import resolve_model_folder
from tasks.mixture import Mixture, parse_task_list
from tasks.prefetch import StepReader
from tasks.readers import content_fingerprint
from training.config import Config
from user_error import UserError

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer as the packing needs it: text as it stands to ids, and the id that ends a document."""

    encode: Callable[[str], list[int]]
    eos_token_id: int
    fingerprint: str
    folder: Path


def load_text_encoder(config: Config, model_folder: Path, num_rows: int) -> TextEncoder:
    """The tokenizer of --tokenizer-name, else of the model. Raises UserError: none there, no EOS, or more ids than the model has rows."""
    from transformers import AutoTokenizer  # at the point of use: half of a rank's start-up time, and only rank 0 tokenises

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one document at a time on the reader's thread
    folder = model_folder
    if config.tokenizer_name is not None:
        try:
            folder = resolve_model_folder(config.tokenizer_name)
        except UserError as error:
            raise UserError(f"--tokenizer-name must be a folder or hub name: {error}") from error
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):  # transformers would make up an empty one
        wanted = " or ".join(" + ".join(names) for names in TOKENIZER_FILES)
        raise UserError(f"the folder {folder} must hold a tokenizer ({wanted}), and holds none. Name one with --tokenizer-name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a broken one, in transformers' words
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the folder {folder} must hold a tokenizer that transformers can load ({reason}). Name one with --tokenizer-name"
        ) from error
    num_ids = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if num_ids > num_rows:
        raise UserError(
            f"the tokenizer must not have more ids than the model has rows; {folder} has {num_ids}, the model {num_rows}. Use "
            "the model's own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"every document ends with EOS, and the tokenizer in {folder} has no eos_token. Add it to its tokenizer_config.json"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        definition = repr(sorted(tokenizer.get_vocab().items()))
    else:
        backend.no_truncation()
        backend.no_padding()
        definition = backend.to_str()

    def encode(text: str) -> list[int]:
        if backend is None:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(backend.encode(text, add_special_tokens=False).ids)

    fingerprint = hashlib.sha256(definition.encode()).hexdigest()
    return TextEncoder(encode=encode, eos_token_id=tokenizer.eos_token_id, fingerprint=fingerprint, folder=folder)


def data_identity(config: Config, encoder: TextEncoder) -> dict[str, Any]:
    """What decides which tokens step n sees, by the name to tell the user. Files may move; what is in them may not change. Raises
    UserError.
    """
    assert config.task_name is not None, "look_around requires it on rank 0"
    tasks = parse_task_list(config.task_name)
    return {
        "--task-name": [f"{Path(task.path).name}:{task.weight:.12g}" for task in tasks],
        "contents of the task files": [content_fingerprint(task.path)[:16] for task in tasks],
        "--seed": config.seed,
        "--seq-length": config.seq_length,
        "--on-bad-record": config.on_bad_record,
        "tokenizer": encoder.fingerprint[:16],
    }


def sequences_per_step(config: Config) -> int:
    """Sequences of one optimizer step over all replicas and accumulation steps."""
    assert config.data_group_size is not None, "parse_config filled it in"
    return config.batch_size * config.data_group_size * config.gradient_accumulate_step


def open_mixture(config: Config, encoder: TextEncoder, state: dict[str, Any] | None) -> Mixture:
    """The mixture of --task-name, at ``state`` or at its beginning. Raises UserError for bad lists, files and records."""
    assert config.task_name is not None, "look_around requires it on rank 0"
    return Mixture(
        tasks=parse_task_list(config.task_name),
        tokenize=encoder.encode,
        eos_token_id=encoder.eos_token_id,
        seq_length=config.seq_length,
        seed=config.seed,
        on_bad_record=config.on_bad_record,
        state=state,
    )


def start_reader(config: Config, mixture: Mixture) -> StepReader:
    """The background worker that tokenises ahead of the training."""
    return StepReader(mixture, sequences_per_step=sequences_per_step(config))
