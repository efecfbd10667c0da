"""Training and evaluation as functions, for notebooks and programs: ``training.run`` and ``training.evaluate``.

The scripts are thin coats over the same functions, so a call does what the command with the same flags does. Every rank of a job calls in
a process of its own; where a peer is lost, that process ends. A single process has no peers, and everything that goes wrong in it is
raised.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.manifest import step_positions
from tasks.task_list import join_items
from training.checkpoints.discovery import newest_in_sight
from training.config.cli import complete
from training.config.evaluation import EvalConfig, complete_eval
from training.config.flags import flag_name, parse_flags
from training.config.train import Config
from training.evaluation.command import evaluate_rank
from training.evaluation.results import EvaluationResults, write_results
from training.job.report import set_up_logging
from training.job.stopping import StopRequest
from training.membership.supervisor import Supervised
from training.runner import Rounds
from user_error import UserError


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training has left. checkpoint: the newest one, a Hugging Face folder; None on ranks that keep no folder."""

    checkpoint_path: Path
    checkpoint: Path | None

    @property
    def train_log(self) -> Path:
        """One JSON object per optimizer step."""
        return self.checkpoint_path / "train_log.jsonl"


def run(config: Config | None = None, **flags: Any) -> RunResult:
    """Train, as ``dist_clm_train.py`` does with these flags (total_steps=100 for --total-steps 100) or with a ``config`` made of them.

    Blocks to the end of the training. Ctrl-C saves and returns, as on the command line; start again with the same flags to go on. Raises
    UserError for everything that the user can cure, in the words of the command line.
    """
    if config is not None and flags:
        raise UserError(f"training.run takes a Config or flags; it was given both ({', '.join(flags)}). Put them into the Config")
    config = complete(make_config(Config, flags) if config is None else config)
    train_rank(config)
    assert config.checkpoint_path is not None, "complete() requires it"
    root = Path(config.checkpoint_path)
    steps = newest_in_sight([step_positions(root)])
    return RunResult(checkpoint_path=root, checkpoint=root / steps[0] if steps else None)


def evaluate(path: str | Path, data: str | Path, *, metric: str = "perplexity", **flags: Any) -> EvaluationResults:
    """Evaluate the model folder, checkpoint or adapter at ``path`` on ``data`` (written as --evaluation-data), as ``dist_clm_eval.py`` does
    with these flags. Returns all numbers and, in ``examples``, what every single example was answered. Raises UserError for everything that
    the user can cure."""
    given = {"model_name": path, "evaluation_data": data, "metric": metric, **flags}
    config = complete_eval(make_config(EvalConfig, given))
    results = evaluate_rank(config)
    if results is None:
        raise UserError(f"training.evaluate returns on rank 0; this is rank {config.rank}. Use dist_clm_eval.py for the other ranks")
    write_results(results, summary=config.json, examples=config.output, picture=config.confusion_png)
    return results


def train_rank(config: Config) -> None:
    """One rank of a training, from meeting the others to parting. Raises UserError, PeerLost."""
    set_up_logging(f"rank{config.rank}")
    with StopRequest() as stop_request:
        Rounds(config, Supervised.from_environment(), stop_request).run()


def make_config(settings: type[Any], flags: dict[str, Any]) -> Any:
    """A dataclass of flags from keyword arguments. Raises UserError for names that are none, with those that are
    near, and for values that the command line would not take."""
    known = {field.name for field in dataclasses.fields(settings)}
    unknown = [name for name in flags if name not in known]
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"flags are given by the names in docs/flags.md, with _ for -; unknown: {', '.join(unknown)}{hint}")
    argv = [f"{flag_name(name)}={_as_text(value)}" for name, value in flags.items() if value is not None]
    return parse_flags(settings, argv, "")


def _as_text(value: Any) -> str:
    """As the command line would have it; a list is one of --task-name's."""
    return join_items(value) if isinstance(value, (list, tuple)) else str(value)
