"""Evaluations while training and by themselves."""
