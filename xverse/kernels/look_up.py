"""IDS, TABLE -> ROWS. Token vectors, from a table that may lie in the host's memory."""

from torch import Tensor
from torch.nn import functional


def look_up(ids: Tensor, table_VD: Tensor) -> Tensor:
    """Rows `ids` (any shape) of the table, [..., D], where the ids are.

    A GPU reads rows of a table in the host's (pinned) memory over its bus: of a token some KB.
    """
    if table_VD.device == ids.device:
        return functional.embedding(ids, table_VD)
    assert table_VD.is_pinned(), "a GPU reads no other memory of the host"
    from xverse.kernels import between_triton

    rows = between_triton.embed_rows(ids.flatten(), table_VD)
    return rows.unflatten(0, ids.shape)
