"""What a person sees of a long run: a bar on a screen, a line a minute in a log file."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping

with warnings.catch_warnings():  # tqdm misses ipywidgets, and draws a bar of text without them
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

SECONDS_PER_LINE = 60.0


class Progress:
    """The progress of a run, on standard error.

    Args:
        total: units in all.
        unit: what is counted, for example "step".
        initial: units that are done.
        show: whether to show anything.
    """

    def __init__(self, total: int, unit: str, initial: int = 0, show: bool = True):
        self.total, self.unit, self.show = total, unit, show
        self.first, self.began = initial, time.monotonic()
        self.written = self.began
        self.bar = None
        if show and _has_screen():
            self.bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True)

    def update(self, done: int, fields: Mapping[str, str]) -> None:
        """Shows that ``done`` units are done, and the fields."""
        if self.bar is not None:
            self.bar.set_postfix(fields, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.show and time.monotonic() - self.written >= SECONDS_PER_LINE:
            self.written = time.monotonic()
            rate = (done - self.first) / (self.written - self.began)
            left = (self.total - done) / rate if rate else float("inf")
            words = "".join(f", {name} {value}" for name, value in fields.items())
            print(
                f"{self.unit} {done}/{self.total}{words}, {_minutes(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def progress(total: int, unit: str, initial: int = 0, show: bool = True) -> Iterator[Progress]:
    """A ``Progress`` that is closed at the end."""
    shown = Progress(total, unit, initial, show)
    try:
        yield shown
    finally:
        shown.close()


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _has_screen() -> bool:
    """Whether a bar can be drawn: in a terminal or a notebook."""
    if sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
