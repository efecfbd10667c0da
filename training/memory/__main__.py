"""python -m training.memory: what a run would take of memory, by stage."""

import sys

from training.memory.prediction import main

sys.exit(main())
