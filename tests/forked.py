"""Processes for tests that need several: forked from one that has imported PyTorch and done nothing else, so that each
starts in a moment."""

import os
import sys
from contextlib import redirect_stdout
from multiprocessing import get_context

import torch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "train"])  # the second is what every optimizer imports


def start(function, *arguments):
    """A process that calls the function of a module; `exitcode` is its status."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def train_in(folder, said, variables, arguments):
    """train.py as torchrun starts it: in a folder, with such variables. What it prints becomes the file `said`."""
    os.chdir(folder)
    os.environ.update(variables, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    import train

    with open(said, "w") as file, redirect_stdout(file):
        sys.exit(train.main(arguments))
