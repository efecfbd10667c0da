"""--profiling: recording where the time of a step goes, and reading that."""
