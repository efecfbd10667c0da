"""The pipeline: who computes what in which order, and the engine that plays it."""
