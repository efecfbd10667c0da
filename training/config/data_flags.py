"""What the flags about data must be to fit each other; cli.py asks, before anything is opened.

What needs the data itself (labels to balance, columns, a tokenizer) is checked where that is opened.
"""

import math

from training.config.shared import ReadingConfig
from training.config.train import Config


def data_problems(config: Config) -> list[str]:
    """Every rule that the data flags of this rank break; [] if none. Rank 0 alone is given the data, so the others cannot miss it."""
    problems = reading_problems(config, [config.task_name, config.evaluation_data])
    epochs = config.num_train_epochs
    if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
        problems.append(f"--num-train-epochs must be above 0; it is {epochs:g}. Give how often the data is to be passed, such as 2 or 0.5")
    if epochs is not None and config.total_steps is not None:
        problems.append("--total-steps and --num-train-epochs both say how long the run is; pass one of them")
    if config.packing != "concat" and config.packing_group != Config.packing_group:
        problems.append(
            f"--packing-group is for --packing concat; --packing {config.packing} has no groups. Leave it out, or pack with concat"
        )
    return problems


def reading_problems(config: ReadingConfig, sources: list[str | None]) -> list[str]:
    """Rules of the flags that say how records become text. ``sources``: the task lists of this rank; None: a flag left out."""
    named = [source for source in sources if source]
    if not named or any("classification=" in source.replace(" ", "") for source in named) or config.task_module is not None:
        return []
    flags = {
        "--text-column": config.text_column is not None,
        "--label-column": config.label_column is not None,
        "--labels": config.labels is not None,
        "--classification-prompt": config.classification_prompt != ReadingConfig.classification_prompt,
    }
    return [
        f"{name} is for task classification, and no source is of that task. Name one, as classification=FILE, or leave it out"
        for name, is_given in flags.items()
        if is_given
    ]
