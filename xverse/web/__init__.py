"""PEOPLE -> REQUESTS. The two pages of the published demos: chat and text generation."""
