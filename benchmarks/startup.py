"""The time until the first step is done: importing, making a small model, one step.

    pip install -e '.[dev,bench]'
    python benchmarks/startup.py [--rounds 5]

Ours and a hand-written loop with `torch.optim.AdamW` take turns, each in a process of its own:
CPU seconds of the whole process, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import harness

_MODEL = """
import resource
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
ids = torch.arange(16).view(2, 8)
"""
_END = """
assert abs(loss - {loss}) < 1e-5, loss
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
KINDS = {
    "loop": """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss.backward()
optimizer.step()
loss = float(loss)
""",
    "functrain": """
import functrain as ft
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model
    def forward(self, input_ids):
        return self.layers(input_ids)
architecture, params, buffers = ft.split(Model())
step = ft.pretrain_step(architecture, ft.optim.adamw(1e-3))
state, metrics = step(step.init(params, buffers), {"input_ids": ids, "labels": ids})
loss = float(metrics["loss"])
""",
    "import torch": "loss = {loss}\n",
}


def seconds(kind: str, loss: float) -> float:
    """CPU seconds of a process that runs this kind."""
    code = _MODEL + (KINDS[kind] + _END).replace("{loss}", repr(loss))
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=quiet)
    return float(done.stdout)


def _loss() -> float:
    """The loss that both must reach."""
    code = _MODEL + KINDS["loop"] + "print(loss)\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    options = parser.parse_args()
    loss = _loss()
    rounds = [{kind: seconds(kind, loss) for kind in KINDS} for _ in range(options.rounds)]
    medians = {kind: statistics.median(each[kind] for each in rounds) for kind in KINDS}
    ratios = [each["functrain"] / each["loop"] for each in rounds]
    print("| until a first step is done | seconds of CPU |\n|---|--:|")
    for kind, median in medians.items():
        print(f"| {kind} | {median:.2f} |")
    low, high = harness.quartiles(ratios)
    print(f"\nfunctrain / loop: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    if options.json is not None:
        found = {"machine": harness.machine(), "rounds": rounds}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
