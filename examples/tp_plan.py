"""What tensor parallelism would split in a model, and what not and why. Nothing is trained.

python examples/tp_plan.py                                     # the library's GPT over 2 ranks
python examples/tp_plan.py 4 my_package.MyModel width=64       # a model of your own over 4
"""

import sys

import torch

from paratrain.build import locate
from paratrain.parallel import tp_products, tp_shapes  # noqa: F401
from paratrain.parallel.tp_attention import shardable_attention
from paratrain.parallel.tp_derive import derive
from paratrain.parallel.tp_split import Peers

ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
name = sys.argv[2] if len(sys.argv) > 2 else "paratrain.models.gpt.GPT"
options = {key: int(value) for key, value in (text.split("=") for text in sys.argv[3:])} or {"vocab_size": 257, "seq_len": 64}
with torch.device("meta"):
    model = locate(name)(**options)
shardable_attention(model)
print(*derive(model, Peers(None, 0, ranks)).lines(), sep="\n")
