"""How ranks find, hear and lose each other. Knows nothing of models, data or checkpoints."""
