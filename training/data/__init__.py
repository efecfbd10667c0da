"""From --task-name to tokens, and where in the data a run is."""
