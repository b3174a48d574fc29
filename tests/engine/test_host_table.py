"""When the embedding can stay in the host's memory, and what is said where it cannot."""

from copy import deepcopy

import pytest
import torch

from tests.engine.tiny import tiny_decoder
from xverse.engine.host_table import keep_on_host
from xverse.errors import XverseError
from xverse.kernels.look_up import look_up
from xverse.model.decoder import Decoder
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme


def why_not(decoder: Decoder) -> str:
    with pytest.raises(XverseError, match="cannot stay in the host's memory") as refusal:
        keep_on_host(decoder)
    return str(refusal.value)


def test_a_cpu_has_no_other_memory() -> None:
    assert "The model is on cpu" in why_not(deepcopy(tiny_decoder()))


def test_what_a_gpu_cannot_read_from_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "device", property(lambda _: torch.device("cuda")))
    small = quantize(deepcopy(tiny_decoder()), Recipe(Scheme(8), embedding=Scheme(8)))
    assert "quantized" in why_not(small)
    tied = deepcopy(tiny_decoder())
    tied.lm_head = None
    assert "It is the head, too" in why_not(tied)
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: False)
    assert "Triton is not installed" in why_not(deepcopy(tiny_decoder()))


def test_rows_beside_the_ids_are_looked_up_as_ever() -> None:
    table, ids = torch.randn(9, 4), torch.tensor([[3, 3], [0, 8]])
    assert torch.equal(look_up(ids, table), table[ids])
