"""Triton's interpreter, mended for the tests of this folder."""

from importlib.util import find_spec

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Triton 3.6 rounds to FP8 without a carry (1.99 becomes 1.0) and cuts bf16 off; a GPU
    rounds to the nearest, and PyTorch does so here. And it cannot count to a tensor by NumPy 2.4.
    """
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain_convert, plain_patch = interpreter._convert_float, interpreter._patch_lang_tensor
    torches = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}

    def convert(data, source, target, rounding):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target in torches:
            rounded = torch.from_numpy(numpy.ascontiguousarray(data)).to(torches[target])
            bits = torch.uint8 if target == tl.float8e4nv else torch.uint16
            return rounded.view(bits).numpy().reshape(data.shape)
        return plain_convert(data, source, target, rounding)

    def patch(tensor, scope):  # type: ignore[no-untyped-def]
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
