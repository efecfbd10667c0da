"""python -m training.evaluation_config > docs/evaluation_flags.md"""

from training.config.evaluation import EvalConfig
from training.config.flags import describe_flags

if __name__ == "__main__":
    print(
        "# Flags of dist_clm_eval.py\n\nMade by `python -m training.evaluation_config > docs/evaluation_flags.md`. Any of them "
        "can stand in `--config FILE.yaml` by name.\n"
    )
    print(describe_flags(EvalConfig), end="")
