"""Steps on disk and snapshots in memory: written, found, loaded."""
