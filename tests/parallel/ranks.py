"""Ranks as threads of one process, which meet in lists: the mesh of these tests."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.parallel.plan import vocabulary_share

Result = TypeVar("Result")


class ThreadMesh:
    """One of several ranks; `table` is where they all put what they have."""

    def __init__(self, rank: int, table: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(table)
        self.table, self.barrier = table, barrier
        self.columns = 0

    def reserve(self, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        self.columns = vocabulary

    def reduce(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        return reference.add_parts(self._collected(x_TD), residual_TD)

    def gather(self, x_TN: Tensor) -> Tensor:
        share = vocabulary_share(self.columns, self.size)
        padded = torch.nn.functional.pad(x_TN, (0, share - x_TN.shape[1]))
        return reference.gather_columns(self._collected(padded), self.columns)

    def _collected(self, x_TN: Tensor) -> Tensor:
        self.table[self.rank] = x_TN
        self.barrier.wait(20)
        parts = torch.stack([part for part in self.table if part is not None])
        self.barrier.wait(20)
        return parts


def on_ranks(size: int, work: Callable[[ThreadMesh], Result]) -> list[Result]:
    """What each rank gives, all working at the same time."""
    table: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(ThreadMesh(rank, table, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
