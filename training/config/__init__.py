"""Flags: what there is, how they are read and checked. Only this room sees all of them."""
