"""What a stage will take of memory, and what to do where that is too much."""
