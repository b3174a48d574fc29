"""DECODING ROWS -> LOGITS, ON A GPU. The fused decode step over the pages, as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xverse.engine.adapter_slots import NOBODY, AdapterSlots
from xverse.engine.paged import Paged
from xverse.engine.step import DecodeStep
from xverse.model.decoder import Decoder

Run = Callable[[], Tensor]


def padded(rows: int) -> int:
    """The size of the captured step that serves so many rows.

    Up to 16 only the weights count, and then each size costs little more than the one before it.
    From 192 to 255 rows cuBLAS takes longer than for 208 or 256 (microseconds a layer of 7B on an
    H200: 176 rows 142, 192 155, 208 151, 224 162, 240 185, 256 161).
    """
    if rows <= 16:
        return 1 << (rows - 1).bit_length()
    if 176 < rows <= 256:
        return 208 if rows <= 208 else 256
    step = max(8, (1 << (rows - 1).bit_length()) // 16)
    return -(-rows // step) * step


class CapturedSteps:
    """Decode steps of any number of rows, captured when a size is first wanted.

    `tables` [slots + 1, P] (int32) and `latest` [slots + 1] (int64) hold each slot's pages and its
    last token; their last row is for rows that nobody fills, and leads to a page that nobody has.
    `turns` are cos and sin [S, E] of every position, which all sizes share. Steps with adapters are
    captured apart from those without.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: Paged,
        tables_SP: Tensor,
        latest_S: Tensor,
        turns: tuple[Tensor, Tensor],
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.decoder, self.kv, self.turns, self.adapters = decoder, kv, turns, adapters
        self.tables_SP, self.latest_S = tables_SP, latest_S
        self._steps: dict[tuple[int, bool], tuple[Tensor, Run]] = {}
        # One memory for all graphs: they never run side by side, and what one leaves is read
        # before the next begins.
        self._pool = torch.cuda.graph_pool_handle() if kv.device.type == "cuda" else None

    def __call__(self, inputs_IB: Tensor, rows: int) -> Tensor:
        """Logits [B, V] of one new token each; valid until the next call.

        `inputs` [3, B] (int32): slot, position, and id, or -1 for the latest of the slot; [4, B]
        with the adapter slot of each row.
        """
        static_IB, run = self.prepare(padded(rows), adapted=len(inputs_IB) == 4)
        static_IB[:, :rows].copy_(inputs_IB)
        if rows < static_IB.shape[1]:
            static_IB[0, rows:] = len(self.latest_S) - 1
            static_IB[1:3, rows:] = 0
            static_IB[3:, rows:] = NOBODY
        return run()[:rows]

    def prepare(self, size: int, *, adapted: bool = False) -> tuple[Tensor, Run]:
        """The step of `size` rows, captured now unless it is already."""
        key = (size, adapted)
        if key not in self._steps:
            self._steps[key] = self._capture(*key)
        return self._steps[key]

    def rehearse(self, size: int, *, adapted: bool = False) -> Tensor:
        """Logits of a step of `size` rows that nobody fills, not captured."""
        return self._step(size, adapted)[1]()

    def _capture(self, size: int, adapted: bool) -> tuple[Tensor, Run]:
        static_IB, run = self._step(size, adapted)
        if self.kv.device.type != "cuda":  # where the tests are: by the plain references
            return static_IB, run
        return static_IB, captured(run, self._pool)

    def _step(self, size: int, adapted: bool) -> tuple[Tensor, Run]:
        device = self.kv.device
        static_IB = torch.zeros(4 if adapted else 3, size, dtype=torch.int32, device=device)
        static_IB[0] = len(self.latest_S) - 1
        static_IB[3:] = NOBODY
        computing = None
        if adapted:
            assert self.adapters is not None, "who has an adapter has a slot for it"
            computing = self.adapters.computing(self.decoder, size, static_IB[3])
        pages = self.tables_SP[static_IB[0]]
        keys, values = list(self.kv.keys), list(self.kv.values)
        scales = [self.kv.scales(layer) for layer in range(len(keys))]
        step = DecodeStep(self.decoder, keys, values, pages, scales, self.turns, computing)

        def run() -> Tensor:
            slots_B, positions_B, ids_B = static_IB[:3]
            step.pages.copy_(self.tables_SP[slots_B])
            step.positions.copy_(positions_B)
            step.ids.copy_(torch.where(ids_B < 0, self.latest_S[slots_B], ids_B))
            return step()

        return static_IB, run


def captured(run: Run, pool: Any = None) -> Run:
    """The operations of `run` as a CUDA graph. They run twice here before they are captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's watchdog asks for its events meanwhile, on another.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()

    def replay(run: Run = run) -> Tensor:  # whose tensors the graph reads: they must stay
        graph.replay()
        return result

    return replay
