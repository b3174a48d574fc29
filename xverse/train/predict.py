"""OPTIONS -> NEEDS. Parameters, arithmetic, memory by parts and time of a run, before it starts."""

from dataclasses import asdict, dataclass

from xverse.kernels.score import LOGITS
from xverse.model.shape import ModelShape
from xverse.train import flops
from xverse.train.options import Training

ASSUMED_MFU = 0.5  # strict; what a plain compiled step reaches at 7B is 0.55 (H200)
SIZES = {"float32": 4, "bfloat16": 2, "none": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `activations` are what the backward pass needs of one pass."""

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int  # whole weights of the units in use, where they are spread over devices
    activations: int
    loss: int  # logits of a chunk, their gradient, and the head's in fp32

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(
    shape: ModelShape,
    options: Training,
    *,
    dtype: str,
    ranks: int,
    learned: int | None = None,
    frozen: int = 0,
) -> Memory:
    """The peak of a step, by parts; it is reached where the backward pass begins.

    Of adapters, `learned` parameters learn beside `frozen` bytes of weights; else all learn.
    """
    size = SIZES[dtype]
    mesh = options.mesh.resolve(ranks)
    shards = mesh.shard * mesh.expert * mesh.context  # of FSDP2
    parts = shards * mesh.tensor * mesh.pipeline
    held = -(-(shape.num_parameters if learned is None else learned) // parts)
    single = dtype == "float32" or options.update.master == "none"
    moments = 2 * SIZES[options.update.moments]
    if options.update.optimizer == "muon":
        matrices = shape.num_linear_parameters / shape.num_parameters
        moments = round(4 * matrices + moments * (1 - matrices))
    gathered = 0
    if shards > 1 and learned is None:  # the schedule of a pipeline gathers whole stages
        units = shape.num_parameters // mesh.pipeline
        gathered = size * (units if mesh.pipeline > 1 else _largest_units(shape, options))
    tokens = options.rows_per_pass * options.row_tokens // mesh.context
    logits = min(LOGITS, tokens * -(-shape.vocab_size // mesh.tensor))
    head = -(-shape.vocab_size // mesh.tensor) * shape.hidden_size
    return Memory(
        weights=size * held + frozen,
        masters=0 if single else 4 * held,
        moments=moments * held,
        gradients=size * held,
        gathered=gathered // mesh.tensor,
        # The first stage of a pipeline keeps as many passes as there are stages: no less in all.
        activations=size
        * (tokens // mesh.tensor)
        * activations(shape, options.compute.recompute, mesh.tensor),
        loss=(2 * size + 4) * logits + (4 * head if learned is None else 0),
    )


def activations(shape: ModelShape, recompute: str, tensor: int = 1) -> int:
    """Numbers a token leaves for the backward pass, in all blocks and around them, on each of the
    `tensor` ranks that share the tokens and gather both normalized streams of a block.

    Of a block without recompute: its input, both normalized streams, q, k and v before and after
    the rotation as one each, what attention gives, the stream between, gate, up and their product.
    """
    hidden = shape.hidden_size
    heads = shape.num_attention_heads * shape.head_dim
    kv_heads = shape.num_key_value_heads * shape.head_dim
    chosen = (shape.moe_top_k + shape.num_shared_experts) if shape.num_experts else 1
    width = shape.intermediate_size * chosen
    block = {
        "none": (2 + 2 * tensor) * hidden + 2 * heads + 2 * kv_heads + 3 * width,
        "selective": 2 * hidden + 2 * heads + 2 * kv_heads + 2 * width,
        "full": hidden,
    }[recompute]
    alive = 0  # of the one block that is computed again
    if recompute != "none":
        alive = (2 + 2 * tensor) * hidden + 2 * heads + 2 * kv_heads + 3 * width
    return shape.num_hidden_layers * block + alive + 3 * hidden


def seconds(
    shape: ModelShape, options: Training, *, peak: float | None, ranks: int
) -> float | None:
    """Of the whole run at ASSUMED_MFU; None where the device's peak is not known."""
    if peak is None:
        return None
    tokens = options.steps * options.rows_per_step * options.row_tokens
    return tokens * flops.strict(shape, options.row_tokens) / (peak * ranks * ASSUMED_MFU)


def _largest_units(shape: ModelShape, options: Training) -> int:
    """Parameters that are whole at a time: embedding, head, and two blocks, the next one on its
    way; or all of them, if they are not given back."""
    if not options.compute.reshard:
        return shape.num_parameters
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return tables + 2 * (shape.num_parameters - tables) // shape.num_hidden_layers
