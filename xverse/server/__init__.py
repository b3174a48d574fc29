"""HTTP -> REQUESTS. The OpenAI-style server: an API process, and an engine process behind it."""
