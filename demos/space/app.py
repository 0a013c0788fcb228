"""The app as a Gradio Space: the page of `steer app`, open to everybody, with the models that come with it."""

import os

import torch

from steer_demos.app.page import build, launch_options
from steer_demos.app.sources import Sources
from steer_demos.models import smollm2

if cores := os.environ.get("CPU_CORES"):  # a Space says how much of its machine it may use; torch counts all of it
    torch.set_num_threads(max(1, int(float(cores))))

smollm2.folder()  # unpacked here once, so that no visitor waits for it

# Each model of the Hub that a visitor names is kept on the Space's disk: off, unless its owner wants it.
demo = build(Sources(hub=os.environ.get("STEER_HUB") == "1"))

if __name__ == "__main__":
    demo.launch(**launch_options())
