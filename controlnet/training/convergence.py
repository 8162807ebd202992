"""Whether control has set in (the paper's sudden convergence, Figure 4), and whether anything still changes: what is
read from the validations of a run."""

import math

# Until control sets in the measure stays below a thousandth: hardly anything of the hint comes through the zero
# convolutions. Then it grows tenfold within some steps. Two validations in a row must reach this, as one may come after
# a step that went astray.
SET_IN = 0.01
BETTER_LOSS, BETTER_MEASURE = 0.99, 1.05  # times the best before: a smaller change does not count
LONG = 10  # validations; a run is flat only if as many steps have passed since the last change as before it, too


class Convergence:
    """Takes one validation after the other. `set_in` is the step at which control set in, None before."""

    def __init__(self, steps: int):
        self.steps, self.set_in = steps, None
        self.first_above: int | None = None
        self.loss, self.measure = math.inf, SET_IN  # the best that counted as a change
        self.changed = self.unchanged = self.seen = 0
        self.told = False

    def news(self, step: int, loss: float, measure: float) -> str:
        """What there is to say after this one, each thing once in a run; "" for nothing."""
        self.seen += 1
        if self.has_just_set_in(step, measure):
            return f"control sets in at step {self.set_in}: images begin to follow their hints"
        self.look_for_change(step, loss, measure)
        if self.told:
            return ""
        if self.set_in is None and self.seen >= LONG and step >= self.steps / 2:
            self.told = True
            return (
                f"control has not set in by step {step}, half of the run: see with `python -m tools.check_data` that "
                "hints belong to their images, or take more --steps, a higher --lr, or a larger batch (--accumulate)"
            )
        if self.set_in is not None and self.unchanged >= LONG and step >= 2 * self.changed:
            self.told = True
            return (
                f"validation loss and control measure have been flat since step {self.changed}: more steps may not "
                "help (Ctrl-C saves and stops; control-best.safetensors is the best by its validation loss)"
            )
        return ""

    def has_just_set_in(self, step: int, measure: float) -> bool:
        if self.set_in is not None:
            return False
        above = measure >= SET_IN
        if above and self.first_above is not None:
            self.set_in, self.told = self.first_above, False
        self.first_above = step if above else None
        return self.set_in is not None

    def look_for_change(self, step: int, loss: float, measure: float) -> None:
        self.unchanged += 1
        if loss < BETTER_LOSS * self.loss:
            self.loss, self.changed, self.unchanged = loss, step, 0
        if measure > BETTER_MEASURE * self.measure:
            self.measure, self.changed, self.unchanged = measure, step, 0
