"""TEXT -> BATCHES. Corpora read, cleaned, mixed, cut into tokenized shards, packed into rows."""
