"""Replicas of a pipeline: their gradients are summed while the backward still runs."""
