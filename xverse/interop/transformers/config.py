"""config.json -> XverseConfig. What transformers wants to know of an XVERSE model."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from xverse.device import DTYPES
from xverse.errors import XverseError
from xverse.log import warn_once
from xverse.model.shape import ModelShape

# Keys by which a config.json could name code for transformers to fetch and run: classes in the
# folder, pipelines, attention kernels on the hub. Underscored keys are refused as a whole.
NAMING_CODE = frozenset(
    {"auto_map", "custom_pipelines", "attn_implementation", "experts_implementation"}
)
PLAIN_ATTENTION = (None, "sdpa", "eager")


class XverseConfig(PreTrainedConfig):
    """The fields of a published config.json as attributes, less those that name code."""

    model_type = "xverse"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **fields: Any) -> None:
        name_attention(fields.get("attn_implementation"))
        kept = {
            key: value
            for key, value in fields.items()
            if key not in NAMING_CODE and not key.startswith("_")
        }
        for key in ("dtype", "torch_dtype"):
            if not _is_dtype(kept.get(key)):
                warn_once(f"config.json has {key} {kept.pop(key)!r:.60}, which is left aside")
        try:
            super().__init__(**kept)
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
            raise XverseError(
                "config.json is not one that transformers takes.", str(error), "Correct the file."
            ) from error

    def shape(self) -> ModelShape:
        """The decoder's shape; XverseError for sizes that are missing or impossible."""
        return ModelShape.from_config(self.to_published())

    def to_published(self) -> dict[str, object]:
        """The fields as config.json has them, transformers' own defaults left out."""
        fields: dict[str, object] = self.to_diff_dict()
        return fields


def name_attention(implementation: object) -> None:
    """Say that this choice of attention is left aside, unless it is what we have."""
    if implementation not in PLAIN_ATTENTION:
        warn_once(
            f"attn_implementation {implementation!r:.60} is left aside: attention is PyTorch's"
        )


def _is_dtype(value: object) -> bool:
    if isinstance(value, torch.dtype) or value is None:
        return True
    return isinstance(value, str) and value.removeprefix("torch.") in DTYPES
