"""python -m training.timeline TRACE: shares of a trace, and a picture of it."""

import sys

from training.timeline.trace import main

sys.exit(main())
