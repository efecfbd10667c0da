"""The update: learning-rate curves, the optimizer, and the one number all ranks decide by."""
