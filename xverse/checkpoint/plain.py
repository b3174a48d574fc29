"""FOLDER -> PLAIN WEIGHTS. The weights of any model as numbers, whatever they are stored as."""

from xverse.checkpoint import gguf
from xverse.checkpoint.load import Checkpoint
from xverse.checkpoint.weights import Weights, open_weights


def plain_weights(checkpoint: Checkpoint) -> Weights:
    """The weights of `checkpoint` under Hugging Face names, one tensor at a time."""
    if checkpoint.path.is_file():
        return gguf.GgufWeights(gguf.GgufFile.open(checkpoint.path))
    return open_weights(checkpoint.path)
