"""One action at a time, in order; its result and its error come out where the owner waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sfedlora.artifacts import WriteBehind
from sfedlora.errors import StorageError


def test_actions_run_beside_the_caller_one_at_a_time() -> None:
    running, most, order = 0, 0, []
    begun, go_on = threading.Event(), threading.Event()

    def action(number: int) -> Callable[[], int]:
        def run() -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            begun.set()
            assert go_on.wait(10)
            order.append(number)
            running -= 1
            return number

        return run

    with WriteBehind[int]() as behind:
        assert behind.wait() is None
        behind.start(action(0))
        assert begun.wait(10), "it runs while the caller goes on"
        assert order == []
        go_on.set()
        for number in (1, 2, 3):
            behind.start(action(number))
        assert behind.wait() == 3
        assert behind.wait() is None
    assert (most, order) == (1, [0, 1, 2, 3])


def _fail() -> None:
    raise StorageError("disk full")


@pytest.mark.parametrize("where", ["wait", "start", "end"])
def test_an_error_comes_out_at_the_next_wait_start_or_end(where: str) -> None:
    reached = []

    def drive() -> None:
        with WriteBehind[None]() as behind:
            behind.start(_fail)
            reached.append("started")
            if where == "wait":
                behind.wait()
            if where == "start":
                behind.start(lambda: reached.append("another"))
            reached.append("end")

    with pytest.raises(StorageError, match="disk full"):
        drive()
    assert reached == (["started", "end"] if where == "end" else ["started"])


def test_what_ends_the_block_matters_more_but_the_action_is_waited_for() -> None:
    done, may_end = [], threading.Event()

    def slow() -> None:
        assert may_end.wait(10)
        done.append(True)
        _fail()

    def stopped() -> None:
        with WriteBehind[None]() as behind:
            behind.start(slow)
            threading.Timer(0.05, may_end.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert done == [True]
