"""The next batch is drawn while the network works on this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from cap4d_core.diffusion.training.batches import BatchSource, TrainingBatch


class Prefetcher:
    """Draws one batch ahead, in a thread: for tables on the CPU, read from disk perhaps.

    Batches depend on their number only, so what is drawn is the same.
    """

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[tuple[int, int], Future[TrainingBatch]] | None = None

    def draw(self, number: int, batch_size: int) -> TrainingBatch:
        """Batch `number`, as the source gives it."""
        wanted = (number, batch_size)
        if self._next is None or self._next[0] != wanted:
            self._next = wanted, self._pool.submit(self.source.draw, *wanted)
        batch = self._next[1].result()
        after = (number + 1, batch_size)
        self._next = after, self._pool.submit(self.source.draw, *after)
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)
