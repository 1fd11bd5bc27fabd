"""Peak memory of the 7B segmentor on one image, streamed; the files are of the released layout, and sparse (all zeros).

    python benchmarks/segmentor_memory.py --side 896 --memory 3GB
    python benchmarks/segmentor_memory.py --blocks 4     the backbone stops after 4 of its 40 blocks; memory is the same

Numbers do not change what is held: only sizes do. Prints the peak of the process that answers, and how long it took.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from densedino.heads.catalog import create_head
from densedino.models.catalog import create_model

HEAD = "vit7b16-ade20k-m2f"
NAMES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
ANSWER = """
import sys, time
from dataclasses import replace
import numpy as np
from densedino.heads import catalog
folder, side, memory, blocks = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if blocks:
    row = catalog.HEADS[{head!r}]
    catalog.HEADS[{head!r}] = replace(row, layers=tuple(range(blocks - 4, blocks)))
import densedino as dd
model = dd.load({head!r}, weights=f"{{folder}}/head.safetensors", backbone_weights=f"{{folder}}/backbone.safetensors",
                engine="stream", memory=memory)
begun = time.process_time()
(out,) = model(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"{{side}} px: classes {{tuple(out.classes.shape)}}, peak {{peak * 1024 / 1e9:.2f}} GB, "
      f"{{time.process_time() - begun:.0f}} s of processor time, {{blocks or 40}} blocks")
"""


def write_sparse(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    header, end = {}, 0
    for key, value in tensors.items():
        kind = dtype if value.is_floating_point() else value.dtype
        start, end = end, end + math.prod(value.shape) * kind.itemsize
        header[key] = {"dtype": NAMES[kind], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=896)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--blocks", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = create_model("vit7b16", device="meta").state_dict()
        ours = ("bias_mask", "periods")  # of which zeros would be refused
        write_sparse(
            folder / "backbone.safetensors", {k: v for k, v in state.items() if not k.endswith(ours)}, torch.bfloat16
        )
        write_sparse(folder / "head.safetensors", dict(create_head(HEAD, device="meta").state_dict()), torch.float32)
        command = [sys.executable, "-c", ANSWER.format(head=HEAD), name, str(args.side), args.memory, str(args.blocks)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
