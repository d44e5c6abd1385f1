"""What the user sees during a run: a progress bar on a terminal, single lines anywhere else."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_HEARTBEAT = 30.0  # seconds without output after which a line tells how far the run is


class Console:
    """Writes lines to standard output, and a progress bar to standard error if that is a terminal."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._where = ""
        self._done = self._total = 0
        self._last = time.monotonic()

    def line(self, text: str = "") -> None:
        self._last = time.monotonic()
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, total: int) -> None:
        """Begin a bar of ``total`` training steps."""
        self.close()
        self._done, self._total = 0, total
        if self._interactive:
            self._bar = tqdm(total=total, unit="step", leave=False, file=sys.stderr, dynamic_ncols=True, smoothing=0.05)

    def where(self, text: str) -> None:
        """Name what the following steps belong to, for example a method and its epoch."""
        self._where = text
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)

    def tick(self, loss: float | None) -> None:
        """Count one step; ``loss`` is None where it was not read."""
        self._done += 1
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last > _HEARTBEAT:
            known = "" if loss is None else f", loss {loss:.3g}"
            self.line(f"  ... {self._where}: step {self._done} of {self._total}{known}")

    def reach(self, done: int) -> None:
        """Move the bar to ``done`` steps or more: a method that diverges leaves out the rest of its steps."""
        if self._bar is not None and done > self._done:
            self._bar.update(done - self._done)
        self._done = max(self._done, done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
