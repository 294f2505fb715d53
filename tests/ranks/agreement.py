"""One rank of `test_world.py`: join the others, and print what `agree` has against them."""

import os

import torch
import torch.distributed as dist

from dist_sft import world
from dist_sft.errors import UserError

torch.set_num_threads(2 if os.environ["RANK"] == os.environ.get("ODD_RANK") else 1)
dist.init_process_group("gloo")
try:
    world.agree(world.facts_of_this_rank({"recipe": "recipe", "data": "data"}, torch.device("cpu")))
except UserError as refusal:
    print(refusal)
else:
    print("agreed")
dist.destroy_process_group()
