"""BATCHES -> BETTER MODEL. The one training loop, and what keeps a run from being lost."""
