"""MODEL -> REPORT. Benchmarks with their published prompts, their errors and their plots."""
