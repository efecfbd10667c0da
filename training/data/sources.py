"""From --tokenizer-name and --task-name to the reader of tokens, on rank 0, and what of them a resume must find unchanged."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.model_folder import resolve_model_folder
from comms.spans import WAITING_FOR_DATA, Spans
from tasks.encoding import Encoder, LossOn
from tasks.mixture import Mixture, OpenDocuments, counted_by_task
from tasks.packing import PackingRules
from tasks.prefetch import StepReader
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import Documents, ReadingRules, open_documents
from tasks.samples import as_text
from tasks.task_list import TaskSpec, parse_task_list
from training.config.flags import flag_name
from training.config.shared import JobConfig, ReadingConfig
from training.config.train import Config
from user_error import UserError

log = logging.getLogger("trainer")

# Flags that decide which tokens a sequence holds, besides the task list, its files and the tokenizer.
_IDENTITY_FLAGS = (
    *("seed", "seq_length", "on_bad_record", "text_column", "label_column", "labels", "classification_prompt"),
    *("loss_on", "packing", "long_documents", "shuffle_window", "max_train_samples", "balance_labels"),
)
_TASK_MODULE, _GROUP = "contents of --task-module", "--packing-group"

# What a checkpoint of a version without one of these flags was trained with.
OLDER_IDENTITY = {_TASK_MODULE: None, _GROUP: None} | {
    flag_name(field.name): field.default for field in dataclasses.fields(Config) if field.name in _IDENTITY_FLAGS
}

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer as packing needs it, where it came from, and hex digits that say which it is."""

    encoder: Encoder
    fingerprint: str
    folder: Path


def load_text_encoder(config: JobConfig, model_folder: Path, num_rows: int, *, loss_on: LossOn) -> TextEncoder:
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

    def token_ids(texts: Sequence[str]) -> list[list[int]]:
        if backend is None:
            return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    encoder = Encoder(token_ids=token_ids, decode=decode, eos_token_id=tokenizer.eos_token_id, loss_on=loss_on)
    return TextEncoder(encoder=encoder, fingerprint=hashlib.sha256(definition.encode()).hexdigest(), folder=folder)


def sequences_per_step(config: Config) -> int:
    """Sequences of one optimizer step over all replicas and accumulation steps."""
    assert config.data_group_size is not None, "parse_config filled it in"
    return config.batch_size * config.data_group_size * config.gradient_accumulate_step


def packing_rules(config: Config) -> PackingRules:
    """How documents become sequences."""
    return PackingRules(seq_length=config.seq_length, mode=config.packing, group=config.packing_group, long_documents=config.long_documents)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """A task list, and how each of its places is opened."""

    tasks: tuple[TaskSpec, ...]
    open_documents: OpenDocuments

    @contextmanager
    def opened(self) -> Iterator[list[Documents]]:
        """All of them, to the end of the block. Raises UserError."""
        with ExitStack() as cleanup:
            documents = []
            for place, task in enumerate(self.tasks):
                documents.append(self.open_documents(task, place))
                cleanup.callback(documents[-1].close)
            yield documents


def training_sources(config: Config, spans: Spans | None = None) -> Sources:
    """What --task-name says. Raises UserError for a bad list and for a task module that does not load."""
    assert config.task_name is not None, "parse_config requires it on rank 0"
    return sources_of(
        config,
        config.task_name,
        ReadingRules(
            on_bad_record=config.on_bad_record,
            shuffle_window=config.shuffle_window,
            max_samples=config.max_train_samples,
            balance_labels=config.balance_labels,
        ),
        spans,
    )


def sources_of(config: ReadingConfig, task_list: str, rules: ReadingRules, spans: Spans | None = None) -> Sources:
    """A task list, read as the flags say; ``rules`` holds what training and evaluation say apart. spans: where this rank says how much of
    them it has read. Runs --task-module. Raises UserError; so does opening."""
    options = TaskOptions(
        text_column=config.text_column,
        label_column=config.label_column,
        labels=config.labels,
        classification_prompt=config.classification_prompt,
    )
    tasks = tasks_by_name(options, config.task_module)
    has_header = not any((column or "").isdigit() for column in (config.text_column, config.label_column))
    rules = dataclasses.replace(rules, has_header=has_header)

    def open_one(spec: TaskSpec, place: int) -> Documents:
        return open_documents(spec, tasks, seed=config.seed, place=place, rules=rules, spans=spans)

    return Sources(tasks=parse_task_list(task_list, more_tasks=tasks), open_documents=open_one)


def data_identity(config: Config, encoder: TextEncoder, mixture: Mixture) -> dict[str, Any]:
    """What decides which tokens step n sees, by the name to tell the user. Files may move; what is in them may not change. Raises
    UserError.
    """
    return {
        "--task-name": [_moved(task) for task in mixture.tasks],
        "contents of the task files": [digits[:16] for digits in mixture.fingerprints()],
        "tokenizer": encoder.fingerprint[:16],
        _TASK_MODULE: None if config.task_module is None else _sha256_of_file(Path(config.task_module)),
        _GROUP: config.packing_group if config.packing == "concat" else None,
        **{flag_name(name): getattr(config, name) for name in _IDENTITY_FLAGS},
    }


def _moved(task: TaskSpec) -> str:
    """A task of the list without the folder that its data lies in."""
    name = "" if task.task == "records" else f"{task.task}="
    return f"{name}{Path(task.source).name}{f'@{task.split}' if task.split else ''}:{task.weight:.12g}"


def _sha256_of_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--task-module must be a readable Python file; {path}: {error.strerror}. Correct the path") from error


def open_mixture(config: Config, encoder: TextEncoder, spans: Spans | None = None) -> Mixture:
    """The mixture of --task-name, at its beginning. Raises UserError for bad lists, files and records."""
    sources = training_sources(config, spans)
    return Mixture(
        tasks=sources.tasks,
        open_documents=sources.open_documents,
        encoder=encoder.encoder,
        rules=packing_rules(config),
        seed=config.seed,
    )


def drawn_so_far(state: Mapping[str, Any] | None) -> dict[str, dict[str, int]]:
    """What train_log.jsonl says of the data since the very first step, by task: tokens, padding not counted, and passes behind them. Empty
    on ranks that have no data (``state`` is None)."""
    if state is None:
        return {}
    return {"tokens_per_task": counted_by_task(state, "tokens"), "passes_per_task": counted_by_task(state, "pass")}


def start_reader(config: Config, mixture: Mixture, spans: Spans, *, shows_samples: bool = True) -> StepReader:
    """The background worker that tokenises ahead of the training, which owns ``mixture`` from now on."""
    if shows_samples:
        with spans.span(WAITING_FOR_DATA):
            _show_samples(mixture, config.show_samples)
    return StepReader(mixture, sequences_per_step=sequences_per_step(config))


def _show_samples(mixture: Mixture, num: int) -> None:
    """--show-samples: the next sequences, which the training will see all the same, as text with what is no target marked."""
    if num:
        log.info("the first %d sequences; what stands in << >> is read and not learnt", num)
    for number, sequence in enumerate(mixture.peek(num), start=1):
        name = mixture.task_names[sequence.task]
        log.info("sequence %d of %d, from %s:\n%s", number, num, name, as_text(sequence, mixture.encoder.decode))
