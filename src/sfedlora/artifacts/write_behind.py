"""One write at a time, behind the compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["WriteBehind"]

T = TypeVar("T")


class WriteBehind(Generic[T]):
    """A thread that runs one action after the other; at most one is under way.

    The owner waits for every action before it starts the next one, so an error surfaces there, or where the block
    ends. Where another error ends the block, it waits too, but that error is the one that is raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._under_way: Future[T] | None = None

    def __enter__(self) -> WriteBehind[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def start(self, action: Callable[[], T]) -> None:
        """Run an action in the thread, after waiting for the one before."""
        self.wait()
        self._under_way = self._pool.submit(action)

    def wait(self) -> T | None:
        """Wait for the action under way and return its result; None where there is none.

        Raises:
            BaseException: whatever the action raised.
        """
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else under_way.result()
