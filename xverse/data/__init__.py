"""TEXT -> BATCHES. Corpora read, cleaned, mixed and cut into tokenized shards."""
