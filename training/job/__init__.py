"""What one process knows of its job and its host."""
