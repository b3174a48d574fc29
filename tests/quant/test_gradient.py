"""Products of frozen quantized layers, with the kernel that widens on a GPU, in the interpreter."""

import os
from typing import Any

import pytest
import torch

from xverse.kernels import dispatch_quantized
from xverse.kernels.choice import Choice
from xverse.kernels.reference_steps import multiply_steps
from xverse.model.linear import Linear
from xverse.quant import gradient
from xverse.quant.linear import QuantizedLinear
from xverse.quant.scheme import Scheme

SCHEMES = {
    "int4": Scheme(4, 32),
    "int4 from zeros": Scheme(4, 32, symmetric=False),
    "int8": Scheme(8, None),
}


def layer_of(scheme: str, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    drawn = torch.Generator().manual_seed(3)
    weight_ND = torch.randn(40, 64, generator=drawn).to(dtype)
    return QuantizedLinear.of(Linear.of(weight_ND, None), SCHEMES[scheme])


def learned(layer: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the gradient by x, of two rows of two each."""
    drawn = torch.Generator().manual_seed(4)
    x = torch.randn(2, 2, 64, generator=drawn).to(layer.scale.dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(2, 2, 40, generator=drawn).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
@pytest.mark.parametrize("rows", [64, 16])  # at a time: all, and parts that are summed
@pytest.mark.parametrize("scheme", SCHEMES)
def test_widened_by_the_kernel(scheme: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from xverse.kernels import dequantize_triton

    layer = layer_of(scheme)
    expected = learned(layer)
    asked = []

    def widen(device: torch.device, dtype: torch.dtype, kind: str) -> Choice:
        asked.append(kind)
        return Choice("", "", "", dequantize_triton.dequantize)

    monkeypatch.setattr(dispatch_quantized, "widen", widen)
    monkeypatch.setattr(gradient, "WIDENED_NUMBERS", 64 * rows)
    for ours, plain in zip(learned(layer), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert asked


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_layer_is_one_graph(scheme: str) -> None:
    """Nothing that the compiler cannot pass, and nothing that it would look into."""
    layer, called = layer_of(scheme), []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    expected = learned(layer)
    torch._dynamo.reset()
    layer.compile(backend=backend, fullgraph=True)
    for ours, plain in zip(learned(layer), expected, strict=True):
        torch.testing.assert_close(ours, plain)
    assert called
    assert not [name for name in called if "dequant" in name or "mm" in name]
    assert any("multiply_frozen" in name for name in called)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_operators_are_what_they_say(scheme: str) -> None:
    """Their shapes, their gradient and what they leave alone, by PyTorch's own check."""
    layer = layer_of(scheme)
    x = torch.randn(3, 64, requires_grad=True)
    arguments = (x, *layer.few_bits())
    torch.library.opcheck(gradient.multiply_frozen, arguments)
    y = gradient.multiply_frozen(*arguments)
    torch.testing.assert_close(y, multiply_steps(x, layer.few_bits()), atol=1e-5, rtol=1e-5)
