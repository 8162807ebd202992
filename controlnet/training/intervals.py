"""How often something is done in a run: every so many steps, or minutes."""

import time


class Interval:
    """ "250" steps, or "10m" for minutes, as `program.interval` allows."""

    def __init__(self, text: str):
        self.steps, self.seconds = (None, 60 * float(text[:-1])) if text.endswith("m") else (int(text), None)
        self.since = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether it is to be done after `done` steps; a new interval then begins."""
        if self.steps is not None:
            return done % self.steps == 0
        now = time.monotonic()
        if now - self.since < self.seconds:
            return False
        self.since = now
        return True
