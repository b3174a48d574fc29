"""IDS -> BATCHES. Sources, mixtures, shards of tokenized documents, and rows to train on."""
