"""Where the commands speak: stderr, so that stdout stays for results."""

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Within the context, what ``tdkd`` logs is shown, from INFO on."""
    logger, handler = logging.getLogger("tdkd"), _Shown()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def progress_bar() -> Progress:
    """Description, bar, done of all, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
