"""REQUESTS -> TOKENS. Sampling, decoding and the LLM class."""
