"""python -m training.config > docs/flags.md"""

from training.config.flags import describe_flags
from training.config.train import Config

print(
    "# Flags of dist_clm_train.py\n\nMade by `python -m training.config > docs/flags.md`. Any of them can stand in "
    "`--config FILE.yaml` by name.\n"
)
print(describe_flags(Config), end="")
