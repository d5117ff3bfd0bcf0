"""Rows in runs."""

from collections.abc import Iterator


def runs(count: int, step: int) -> Iterator[slice]:
    """Slices of ``step`` over ``count``, at least one."""
    for start in range(0, max(1, count), step):
        yield slice(start, min(count, start + step))
