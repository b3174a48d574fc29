"""quantization_config -> LAYOUT. The format of a quantized folder; others are refused."""

from collections.abc import Mapping

from xverse.quant.stored_awq import Awq
from xverse.quant.stored_compressed import Compressed
from xverse.quant.stored_gptq import Gptq
from xverse.quant.stored_layer import Layout, not_read

FORMATS = {form.method: form for form in (Compressed, Gptq, Awq)}


def layout_of(config: Mapping[str, object]) -> Layout:
    """The layout that the `quantization_config` of a folder describes.

    Raises XverseError for methods and variants that this version does not read.
    """
    form = FORMATS.get(str(config.get("quant_method")))
    if form is None:
        raise not_read(config, f"a quant_method other than {', '.join(FORMATS)}")
    return form(config)
