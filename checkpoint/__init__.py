"""Weights and training state on disk: Hugging Face folders sharded by layer, written aside and committed as a whole."""
