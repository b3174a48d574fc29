"""IDS -> HIDDEN, ONE TOKEN EACH. A decode step of a prepared decoder on a CPU, in one call."""

import ctypes

import torch
from torch import Tensor

from xverse.engine.paged import Paged
from xverse.errors import XverseError
from xverse.kernels import native
from xverse.model.decoder import Decoder
from xverse.quant.prepare import PackedBlock


class PackedStep:
    """All layers of a decoder for rows that are attended to alone, as `Decoder.hidden`.

    The layers' weights and the pages must stay where they are.
    """

    def __init__(self, decoder: Decoder, kv: Paged) -> None:
        assert fits(decoder, kv), "`fits` has been asked"
        self.decoder, self.kv = decoder, kv
        layers = []
        for keys, values, block in zip(kv.keys, kv.values, decoder.model.layers, strict=True):
            assert isinstance(block, PackedBlock)
            products = (layer.packed.described() for layer in block.products())
            layers.append(native.Layer(*products, keys.data_ptr(), values.data_ptr()))
        self.layers = (native.Layer * len(layers))(*layers)

    def __call__(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Normalized hidden states [T, D]; `kv.begin` has been called, and gave `kv.alone`."""
        assert self.kv.alone is not None, "rows are attended to alone"
        tables_TP, lengths_T = self.kv.alone
        decoder, shape = self.decoder, self.decoder.shape
        x_TD = decoder.model.embed_tokens(ids_T).contiguous()
        cos_TE, sin_TE = decoder.turns(positions_T, self.kv, x_TD.dtype)
        heads = (shape.num_attention_heads, shape.num_key_value_heads)
        sizes = (tables_TP.shape[1], self.kv.page_size, shape.head_dim, *heads)
        pages = native.Pages(None, None, tables_TP.data_ptr(), lengths_T.data_ptr(), *sizes)
        failed = native.loaded().decode(
            self.layers,
            len(self.layers),
            ctypes.byref(pages),
            x_TD.data_ptr(),
            cos_TE.contiguous().data_ptr(),
            sin_TE.contiguous().data_ptr(),
            len(x_TD),
            native.FLOATS[x_TD.dtype],
            torch.get_num_threads(),
        )
        if failed:
            raise XverseError(
                "There is no memory for a decode step.",
                f"What {len(x_TD)} tokens need between two layers did not fit.",
                "Free memory, or lower max_running.",
            )
        normed: Tensor = decoder.model.norm(x_TD)
        return normed


def fits(decoder: Decoder, kv: Paged) -> bool:
    """Whether every layer is repacked whole, and the pages can be read by compiled attention."""
    layers = decoder.model.layers
    return kv.compiled and all(
        isinstance(block, PackedBlock) and all(part.order is None for part in block.products())
        for block in layers
    )
