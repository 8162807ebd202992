"""What people type who come from other trainers."""

from dataclasses import fields

import pytest

from controlnet.common.program import flag_of
from controlnet.training.options import TrainSettings, parse_args
from controlnet.training.other_names import NOT_NEEDED, OURS

FLAGS = {flag_of(item.name) for item in fields(TrainSettings)}


def test_the_names_that_are_advised_exist_and_the_others_do_not():
    assert {ours.split()[0].rstrip(",") for ours in OURS} <= FLAGS
    others = [other for names in (*OURS.values(), *NOT_NEEDED.values()) for other in names.split()]
    assert len(set(others)) == len(others) and not {f"--{other}" for other in others} & FLAGS


TYPED = [
    ("--learning_rate 1e-5 --max_train_steps=100", "--learning_rate is --lr here; --max_train_steps is --steps here"),
    ("--resume latest", '--resume takes no value, found "latest": it goes on with the newest state in --out'),
    ("--resume_from_checkpoint latest", "--resume_from_checkpoint is --resume, with the run's --out here"),
    ("--resume-from-checkpoint=latest", "--resume-from-checkpoint is --resume, with the run's --out here"),
    ("--batch_size 4", "there is no --batch_size, say --batch-size"),
    ("--stepz 4 --lr 1", "there is no --stepz, say --steps"),
    ("--save_model_as ckpt", "--save_model_as is not needed, files are always safetensors, which other programs read"),
    ("--scale_lr", "--scale_lr is not needed, --lr is taken as it is, for any batch"),
    ("--tensorboard", "--tensorboard is --log tensorboard here"),
]


@pytest.mark.parametrize("words, sentence", TYPED)
def test_another_trainers_name_is_answered_with_ours(capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", words.split())
    assert stopped.value.code == 2 and capsys.readouterr().err == f"train.py: {sentence}\n"


@pytest.mark.parametrize("words", ["--learning_rate 1 --hypernetwork", "my/pairs", "-b 4", "--resume -b"])
def test_what_is_like_nothing_that_is_known_is_said_as_it_came(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"unrecognized arguments: {words.removeprefix('--resume ')}" in error


def test_a_hint_comes_with_its_prompt():
    given = parse_args("", ["--validate", "a.png", "a cat", "--validate", "b.png", ""])
    assert given == {"validate": [["a.png", "a cat"], ["b.png", ""]]}
