"""COMPRESSED-TENSORS <-> LAYER. The format in which we store quantized models, and read others'.

    weight_packed int32 [N, D * bits / 32]       integers made positive, the first lowest
    weight        float8_e4m3fn or int8 [N, D]   in its place: fp8, and int8 that is not packed
    weight_scale  [N, G], [N, 1] for one a row, [1] for one in all
    weight_zero_point int32 [N * bits / 32, G]   of asymmetric integers, packed along the rows;
                  int8 [N, G] where the weight is not packed
    weight_shape  int64 [2]                      beside weight_packed

Which layer has which scheme is said by groups of targets: names, "re:" patterns, class names.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.kernels.reference_steps import pack_nibbles
from xverse.log import logger
from xverse.model.embedding import Embedding
from xverse.model.linear import Linear, StackedLinear
from xverse.quant.linear import QuantizedLinear
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme
from xverse.quant.stored_layer import (
    LayerTensors,
    Parts,
    from_words,
    group_size_of,
    not_read,
    number,
    signed,
    to_words,
    unsigned,
)

METHOD = "compressed-tensors"
PACKED, FLOAT, MIXED = "pack-quantized", "float-quantized", "mixed-precision"
UNPACKED = ("int-quantized", "naive-quantized")
HEAD_TARGET, EMBEDDING_TARGET = "re:.*lm_head$", "re:.*embed_tokens$"
# A folder's patterns are matched against its names: none may take exponentially long to.
_RISKY = re.compile(r"[)\]}][*+?{]|[*+?}][*+{]|\\[1-9]")
MAX_REPEATS, MAX_PATTERN = 3, 200
NO_MATCH = 3


def to_config(recipe: Recipe, *, tied: bool = False) -> dict[str, object]:
    """The quantization_config of a model quantized by `recipe`; `tied`: its head is its embedding.

    The package reads all of it. transformers (5.23) does not: of asymmetric schemes it wants to be
    told `dequantize=True`, and a quantized embedding it can't load at all.
    """
    schemes, head = {"Linear": recipe.scheme}, None if tied else recipe.head
    if head is not None:
        schemes[HEAD_TARGET] = head
    if recipe.embedding is not None:
        schemes[EMBEDDING_TARGET] = recipe.embedding
    formats = {_format(scheme) for scheme in schemes.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": [target],
                "weights": _weights(scheme),
                "input_activations": None,
                "format": _format(scheme),
            }
            for index, (target, scheme) in enumerate(schemes.items())
        },
        "ignore": ["re:.*router$"] + (["lm_head"] if head is None else []),
    }


def _format(scheme: Scheme) -> str:
    return FLOAT if scheme.kind == "float" else PACKED


def _weights(scheme: Scheme) -> dict[str, object]:
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def to_disk(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of a layer of [N, D] on the CPU, without its name; its bias among them."""
    scheme, scale, zero = layer.scheme, layer.scale, layer.zero
    if layer.order is not None:
        raise XverseError(
            "A model with sorted columns (GPTQ's desc_act) can't be saved.",
            "compressed-tensors has no place for their order any more.",
            "Keep its own folder, or quantize the original with `xverse quantize`.",
        )
    if scheme.group_size is None:
        scale, zero = scale[:, None], None if zero is None else zero[:, None]
    tensors = {"weight_scale": scale.contiguous()}
    if scheme.kind == "float":
        tensors["weight"] = layer.weight
    else:
        bits, steps = scheme.bits, layer.integers()
        tensors["weight_packed"] = to_words(unsigned(steps, bits), bits)
        tensors["weight_shape"] = torch.tensor(steps.shape)
        if zero is not None:
            words = to_words(unsigned(zero, bits).t(), bits)
            tensors["weight_zero_point"] = words.t().contiguous()
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return tensors


class Compressed:
    """The layout of a folder with this quantization_config; XverseError for other variants."""

    method, mark = METHOD, "weight_scale"

    def __init__(self, config: Mapping[str, object]) -> None:
        number(config, "format", PACKED, FLOAT, MIXED, *UNPACKED, default=PACKED)
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(key):
                raise not_read(config, f"a {key}")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise not_read(config, "no config_groups")
        self.targets = [one for group in groups.values() for one in _targets(config, group)]

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """As `Layout.scheme_of`: by name before pattern before class."""
        kinds = {Linear: "Linear", StackedLinear: "Linear", Embedding: "Embedding"}
        kind = kinds.get(type(module))
        if kind is None:
            return None
        ranked = sorted((one.rank(name, kind), at) for at, one in enumerate(self.targets))
        best, at = ranked[0]
        return self.targets[at].scheme if best < NO_MATCH else None

    def read(self, scheme: Scheme, rows: int, columns: int, tensors: LayerTensors) -> Parts:
        """As `Layout.read`."""
        groups, bits = columns // (scheme.group_size or columns), scheme.bits
        packed = tensors.shape("weight_packed") is not None
        if packed:
            if columns * bits % 8 or tensors.read("weight_shape", (2,), torch.int64).tolist() != [
                rows,
                columns,
            ]:
                raise _unequal(f"its weight_shape is not that of the model, {rows} x {columns}")
            words = tensors.read("weight_packed", (rows, -(-columns * bits // 32)), torch.int32)
            weight = from_words(words, 8, columns * bits // 8)
            weight = weight if bits == 4 else signed(weight, 8)
        else:
            dtype = torch.float8_e4m3fn if scheme.kind == "float" else torch.int8
            weight = tensors.read("weight", (rows, columns), dtype)
            weight = pack_nibbles(weight) if bits == 4 else weight
        scale, zero = _scale(rows, groups, tensors), None
        if not scheme.symmetric and packed:
            packed_zero = (-(-rows * bits // 32), groups)
            words = tensors.read("weight_zero_point", packed_zero, torch.int32)
            zero = signed(from_words(words.t(), bits, rows), bits).t().contiguous()
        elif not scheme.symmetric:
            zero = tensors.read("weight_zero_point", (rows, groups), torch.int8)
        if scheme.group_size is None:
            scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
        return Parts(weight.contiguous(), scale, zero)


def _scale(rows: int, groups: int, tensors: LayerTensors) -> Tensor:
    """The scales [rows, groups]; one for a whole matrix is repeated for every row."""
    shape = tensors.shape("weight_scale")
    if groups == 1 and shape in ((), (1,), (1, 1)):
        return tensors.read("weight_scale", shape, tensors.dtype).reshape(1, 1).repeat(rows, 1)
    return tensors.read("weight_scale", (rows, groups), tensors.dtype)


def _unequal(why: str) -> XverseError:
    return XverseError(
        "A quantized layer does not fit the model.",
        f"{why[0].upper()}{why[1:]}.",
        "Fetch the folder again.",
    )


class _Target(NamedTuple):
    """Which layers a scheme is for: those of a name, of a pattern, or of a class."""

    text: str
    pattern: re.Pattern[str] | None
    scheme: Scheme

    def rank(self, name: str, kind: str) -> int:
        """0, 1, 2: `name` itself, its pattern, or its class is meant; NO_MATCH: none of them."""
        if self.pattern is not None:
            return 1 if self.pattern.match(name) else NO_MATCH
        return 0 if self.text == name else 2 if self.text == kind else NO_MATCH


def _targets(config: Mapping[str, object], group: Mapping[str, object]) -> list[_Target]:
    """A group's targets, each with its scheme."""
    if not isinstance(group, Mapping) or not isinstance(targets := group.get("targets"), list):
        raise not_read(config, f"the group {group!r:.60}")
    scheme, found = _scheme(config, group), []
    for text in map(str, targets):
        pattern = _pattern(config, text[3:]) if text.startswith("re:") else None
        found.append(_Target(text, pattern, scheme))
    return found


def _pattern(config: Mapping[str, object], text: str) -> re.Pattern[str]:
    repeats = sum(map(text.count, "*+{"))
    if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or _RISKY.search(text):
        raise not_read(config, f"the pattern {text!r:.60}, which could take for ever to match")
    try:
        return re.compile(text)
    except re.error as error:
        raise not_read(config, f"the pattern {text!r:.60}: {error}") from error


def _scheme(config: Mapping[str, object], group: Mapping[str, object]) -> Scheme:
    """The scheme that the `weights` of a group of the config describe."""
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise not_read(config, "a group without weights")
    fields = {"quant_method": config.get("quant_method"), **weights}
    bits = number(fields, "num_bits", 4, 8, default=None)
    kind = number(fields, "type", "int", "float", default="int")
    strategy = number(fields, "strategy", "group", "channel", "tensor", default=None)
    symmetric = number(fields, "symmetric", True, False, default=True)
    number(fields, "dynamic", False, default=False)
    number(fields, "actorder", None, False, "weight", "static", default=None)
    size = group_size_of(fields)
    if (size is None) is (strategy == "group"):
        raise not_read(fields, f"group_size = {size!r} and strategy = {strategy!r}")
    _check_activations(config, group)
    assert isinstance(bits, int)
    return Scheme(bits, size, bool(symmetric), "float" if kind == "float" else "int")


def _check_activations(config: Mapping[str, object], group: Mapping[str, object]) -> None:
    """Activations stay in 16 bits here, which only gains, where they would be rounded as they come;
    with scales of their own in the folder, it is another model."""
    for key in ("input_activations", "output_activations"):
        activations = group.get(key)
        if activations and not (isinstance(activations, Mapping) and activations.get("dynamic")):
            raise not_read(config, f"{key} with scales of their own")
        if activations:
            logger.info("%s are not quantized: they stay in 16 bits", key)
