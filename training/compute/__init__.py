"""One step on one rank: the stage, its gradient, and what reaches it."""
