"""Training text: which task each sequence is drawn from, how its documents are read, packed, and prepared one step ahead."""
