"""TEXT <-> IDS. Tokenizer, chat prompts, function calls, streams of text."""
