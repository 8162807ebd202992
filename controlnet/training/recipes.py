"""Recipes: the controls of version 1.1 whose hints are whole pictures. Each is nothing but settings of its own.

- `tile`: the picture at an eighth of its resolution, enlarged again; the details are painted anew.
- `inpaint`: the picture with a hole, where the hint is -1.
- `shuffle`: the picture's colours at other places; averaged residuals can say nothing of places.
- `ip2p`: the picture to change, with an instruction as the prompt (Brooks, Holynski, Efros, arXiv 2211.09800).

Version 1.1's README tells of trainings that differ in part: half of its holes were what optical flow covers up, and
half of ip2p's prompts described the picture after the change ("a cute boy"); here all are instructions. Here a picture
has one random hole or shuffle, the same in each epoch, so that hints can be stored and a run resumes exactly. For more
of them it takes more pictures: `--no-cache` draws them without end, or crops a folder's anew with `--random-crop`.
"""

from pathlib import Path

from controlnet.worlds import WORLDS

RECIPES = {
    "tile": dict(data="scenes", detect="tile"),
    "inpaint": dict(data="shapes", detect="inpaint"),
    "shuffle": dict(data="scenes", detect="shuffle", global_average_pooling=True),
    # What to change nobody sees without the instruction: left out as seldom as in InstructPix2Pix's training, in 5 %
    # of the samples alone and in 5 % with the picture, which stays here.
    "ip2p": dict(data="edits", prompt_dropout=0.1),
}
BEFORE_AS_HINTS = (
    "the recipe ip2p learns from pairs, so put each picture as it is before the change into hints/, beside images/ and "
    "under the same name"
)


def settings_of(recipe: str | None, given: dict, side: int) -> dict:
    """What the recipe adds to the settings that are given, for images whose shorter side is `side` pixels.

    Raises ValueError for given ones that contradict it.
    """
    if recipe is None:
        return {}
    preset = dict(RECIPES[recipe])
    if recipe == "shuffle":
        preset["detect"] += f":cell={side // 2}"  # in v1.1 the colours move by noise of 256 pixels, half a side
    detect, data = given.get("detect"), given.get("data", preset["data"])
    if detect is not None and detect.lower().partition(":")[0] != recipe:
        raise ValueError(f"the recipe {recipe} says what its hints are, and --detect {detect} others: leave out one")
    if recipe == "ip2p" and data in WORLDS and data != preset["data"] and not Path(data).is_dir():
        raise ValueError(
            f"the recipe ip2p learns from pairs of a picture before and after a change, and {data} has none: give a "
            f"folder of such pairs, or --data {preset['data']}"
        )
    return {name: value for name, value in preset.items() if name not in given}
