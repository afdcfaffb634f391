"""LoRA: adapters are the params, and the base that they lie on is part of the architecture.

    architecture, params, buffers, tokenizer = functrain.models.from_pretrained("models/smollm2")
    adapted, adapters = functrain.lora.attach(architecture, params, functrain.lora.LoRA(rank=16))
    reference = functrain.lora.reference(adapted, adapters)
    step = functrain.dpo_step(adapted, functrain.optim.adamw(1e-4), reference=reference)
    state = step.init(adapters, buffers)

A state, its checkpoints and its optimizer hold only the adapters, and the fingerprint of the base.
So several adapters can train over one base, in turns: each is a state of the same architecture.
"""

from functrain.lora.attach import Adapter, adapter_of, attach, is_adapted
from functrain.lora.config import LoRA
from functrain.lora.merge import merged, reference
from functrain.lora.peft import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "LoRA",
    "adapter_of",
    "attach",
    "is_adapted",
    "load_adapter",
    "merged",
    "reference",
    "save_adapter",
]
