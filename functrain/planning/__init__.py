"""Predicts the memory and time that a training run will take on a cluster, without the cluster.

    architecture, params, buffers = ft.models.bare(lambda: ft.models.decoder(config))
    job = ft.planning.Job(
        architecture=architecture, params=params, buffers=buffers, optimizer=ft.optim.adamw(),
        rows=1024, time=4096, microbatches=1024, precision="bf16", checkpoint="model.layers.*",
    )
    plan = ft.planning.plan(job, ft.planning.cluster("h100", 1024, job.precision))
    print(plan.sharded.bytes, plan.sharded.step)

The model is stated in `functrain.planning.plan`; `benchmarks/plan.py` compares it with measurements
on this machine.
"""

from functrain.planning.cluster import DEVICES, Cluster, Device, cluster
from functrain.planning.counting import Job, Work, count
from functrain.planning.measuring import here
from functrain.planning.plan import Layout, Plan, plan, planned

__all__ = [
    "DEVICES",
    "Cluster",
    "Device",
    "Job",
    "Layout",
    "Plan",
    "Work",
    "cluster",
    "count",
    "here",
    "plan",
    "planned",
]
