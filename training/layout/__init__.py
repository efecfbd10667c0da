"""Which rank holds which layers, from flags or from measurements."""
