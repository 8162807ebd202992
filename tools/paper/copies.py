"""What of the copy matters: the base's weights in it, its training, or that there is one."""

from functools import partial

from .architectures import below_full, ious_of, measure, tables
from .experiment import Experiment
from .statistics import IS, Verdict, all_of, judged

OTHERS = ("random", "frozen", "concat")


def verdict(numbers: dict) -> Verdict:
    below = {name: below_full(numbers, name, "no prompt") for name in OTHERS}
    words = ", ".join(f"{name} {IS[low]} below it" for name, low in below.items())
    words = f"without prompts, beside the trained copy of the base's weights: {words}"
    return judged(ious_of(numbers, "full", "no prompt"), all_of(*below.values()), words)


EXPERIMENT = Experiment(
    title="What the copy is good for (section 3.1)",
    claim="The trainable copy reuses the pretrained model: its weights are a deep, robust and strong backbone for "
    "learning conditional control.",
    how="`random`: the copy starts from random weights. `frozen`: it stays as it is, and only hint encoder and zero "
    "convolutions learn. `concat`: no copy; the hint encoder's features are concatenated to the latents at the input "
    "of the locked encoder, whose first convolution is widened for them (here from the difference of two passes: it "
    "would cost less). The paper does not report these. All have the same steps on the same images. "
    "The IoU is judged; the validation loss is what still tells apart those that all follow their hints.",
    measure=partial(measure, name="copies", architectures=("full", *OTHERS), kinds=("no prompt", "perfect")),
    tables=tables,
    verdict=verdict,
)
