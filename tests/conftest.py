"""Puts this folder on the path of every test: `tiny`, `tiny_pipelines` and `probes` are imported by name."""

import torch

torch.set_num_threads(1)  # the models are tiny
