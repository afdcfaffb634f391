"""A step in fp32, bf16 and fp16: time, memory and loss.

    pip install -e '.[dev,hf]'
    python benchmarks/precision.py [--model large] [--rounds 3] [--steps 3] [--threads 1]

Model and batches are those of `steps.py`. A processor without half-precision instructions computes
by conversion: there half precision costs time and saves only activations. It pays on an
accelerator.
"""

from __future__ import annotations

import json
import statistics
import warnings

import harness
import steps
import torch
from steps import SIZES

KINDS = ("fp32", "bf16", "fp16", "bf16_params")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=SIZES, default="small")
    options = parser.parse_args()
    if options.child is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        found = steps.functrain(SIZES[options.model], options.steps, precision=options.child)
        print(json.dumps(found))
        return
    arguments = ["--model", options.model, "--steps", str(options.steps)]
    results = harness.interleaved(__file__, KINDS, options.rounds, arguments, options.threads)
    title = f"{options.model}, {options.threads} thread(s), {options.rounds} rounds"
    losses = {kind: statistics.median(r["losses"][-1] for r in results[kind]) for kind in KINDS}
    print(f"{title}; ratios to fp32; the last loss: {losses}")
    print(harness.table(results, lambda _kind: "fp32"))
    harness.written(options, title, results)


if __name__ == "__main__":
    main()
