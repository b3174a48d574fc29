"""OPTIONS -> NEEDS. Parameters, arithmetic, memory by parts and time of a run, before it starts."""

from dataclasses import asdict, dataclass

from xverse.kernels.score import WIDE, chunk_rows
from xverse.model.shape import ModelShape
from xverse.train import flops
from xverse.train.offload import PIECE, PLACES
from xverse.train.options import Computing, Training

ASSUMED_MFU = 0.5  # strict; what a plain compiled step reaches at 7B is 0.55 (H200)
SIZES = {"float32": 4, "bfloat16": 2, "none": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `activations` are what the backward pass needs of one pass.

    Of the gradients of a single pass only those count that do not fit where activations were: each
    block's come as its activations go. `host` are bytes of the host's memory, for each process:
    what is offloaded, or else a checkpoint's copy of what is kept.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int  # whole weights of the units in use, where they are spread over devices
    activations: int
    working: int  # for a moment: logits and the head's gradient, or a block and its gradients
    host: int

    @property
    def total(self) -> int:
        """Of the device."""
        return sum(asdict(self).values()) - self.host


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
    offload = options.compute.offload
    away = offload == "parameters"
    gathered = 0
    if (shards > 1 and learned is None) or away:  # a pipeline's schedule gathers whole stages
        units = shape.num_parameters // mesh.pipeline
        gathered = size * (units if mesh.pipeline > 1 else _largest_units(shape, options))
    tokens = options.rows_per_pass * options.row_tokens // mesh.context
    # The first stage of a pipeline keeps as many passes as there are stages: no less in all.
    kept = size * (tokens // mesh.tensor) * activations(shape, options.compute, mesh.tensor)
    working = max(
        _loss(shape, tokens, size, mesh.tensor, learns=learned is None),
        _block(shape, options.compute, tokens // mesh.tensor, size, mesh.tensor),
    )
    gradients = size * held
    if away:  # they leave unit by unit; the last one's are there with what they are summed in
        ends = tables(shape) if learned is None else 0
        gradients = max(0, (size + (2 * size if shards == 1 else 8)) * ends - kept - working)
    elif options.rows_per_step <= mesh.readers * options.rows_per_pass:
        gradients = max(0, gradients - kept - working)
    masters = 0 if single else 4 * held
    host = (masters or size * held) + moments * held
    if offload == "optimizer":
        host += 2 * PLACES * SIZES["float32"] * PIECE
    elif away:
        host += (size * held if masters else 0) + frozen + size * held  # and gradients
    return Memory(
        weights=0 if away else size * held + frozen,
        masters=masters if offload == "none" else 0,
        moments=moments * held if offload == "none" else 0,
        gradients=gradients,
        gathered=gathered // mesh.tensor,
        activations=kept,
        working=working,
        host=host,
    )


def activations(shape: ModelShape, compute: Computing, tensor: int = 1) -> int:
    """Numbers a token leaves for the backward pass, in all blocks and around them, on each of the
    `tensor` ranks that share the tokens and gather both normalized streams of a block.

    Of a block without recompute: its input, both normalized streams, q, k and v before and after
    the rotation as one each, what attention gives, the stream between, gate, up and their product.
    In 8 bits the inputs of products are half a number each, or made anew from what is there.
    """
    hidden, attention, width = _widths(shape)
    block = {
        "none": (2 + 2 * tensor) * hidden + attention + 3 * width,
        "selective": 2 * hidden + attention + 2 * width,
        "full": hidden,
    }[compute.recompute]
    if compute.fp8 and compute.recompute == "none":
        block = 2 * hidden + attention + 2 * width + hidden // 2
    return shape.num_hidden_layers * block + 3 * hidden


def _loss(shape: ModelShape, tokens: int, size: int, tensor: int, *, learns: bool) -> int:
    """Logits of a chunk, the head's gradient in fp32 with what is added to it, and on a GPU the
    head with rows up to a round number."""
    vocabulary = -(-shape.vocab_size // tensor)
    in_place = size == SIZES["bfloat16"]  # on a GPU; a CPU has the gradient beside the logits
    logits = min(tokens, chunk_rows(tokens, vocabulary, in_place=in_place)) * vocabulary
    head = (4 + size) * vocabulary * shape.hidden_size if learns else 0
    wide = size * vocabulary * shape.hidden_size if in_place and vocabulary % WIDE else 0
    return (size if in_place else 2 * size + 4) * logits + head + wide


def _block(shape: ModelShape, compute: Computing, tokens: int, size: int, tensor: int) -> int:
    """Gradients within a block, and what it computes again."""
    hidden, attention, width = _widths(shape)
    again = (2 + 2 * tensor) * hidden + attention + 3 * width
    return size * tokens * (2 * hidden + 3 * width + (again if compute.recompute != "none" else 0))


def _widths(shape: ModelShape) -> tuple[int, int, int]:
    """Of a token: the stream, all that attention takes and gives, and the feed-forward."""
    attention = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    chosen = (shape.moe_top_k + shape.num_shared_experts) if shape.num_experts else 1
    return shape.hidden_size, attention, shape.intermediate_size * chosen


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
    ends = tables(shape)
    return ends + 2 * (shape.num_parameters - ends) // shape.num_hidden_layers


def tables(shape: ModelShape) -> int:
    """Parameters of embedding and head."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
