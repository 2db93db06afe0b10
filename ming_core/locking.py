"""One thread a model at a time: a rule, and the lock that keeps it.

A round prepares weights on its first use and computes with some of them upcast; another thread that came in between
would see them half-way. So whatever computes with a model holds the model's lock, and a second thread waits. The thread
that holds the lock may take it again: a preview is decoded while its image is drawn.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class ModelLock:
    """A lock that can be taken several times by one thread; a copy of a model has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> ModelLock:
        return ModelLock()

    def __reduce__(self) -> tuple:
        return ModelLock, ()


class Locked(Protocol):
    @property
    def lock(self) -> ModelLock: ...


Owner = TypeVar("Owner", bound=Locked)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def exclusive(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """A method that holds its owner's lock while it runs, and lets it go however it ends."""

    @functools.wraps(method)
    def locked(owner: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with owner.lock:
            return method(owner, *args, **kwargs)

    return locked
