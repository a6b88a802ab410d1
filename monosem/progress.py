"""Progress bars with rate and time left, for stages that take longer than a glance."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text
from transformers.utils import logging as transformers_logging

from activation_store.progress import Progress

transformers_logging.disable_progress_bar()  # our bars speak for everything that takes long
transformers_logging.set_verbosity_error()
console = Console(highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Units a second, over the last half minute."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else "")


@contextmanager
def progress_bar(what: str, unit: str = "tok") -> Iterator[Progress]:
    """Show a bar while the block runs; call the yielded function with (done, total)."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), _Rate(unit), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Bars(*columns, console=console, transient=True, refresh_per_second=4) as bars:
        task = bars.add_task(what, total=1, visible=False)

        def report(done: int, total: int) -> None:
            bars.update(task, completed=done, total=max(total, 1), visible=True)

        yield report
