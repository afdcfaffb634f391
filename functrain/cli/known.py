"""The names that a config may use; a test keeps them equal to the library's.

They are repeated here because checking a config must not import torch.
"""

from __future__ import annotations

PRECISIONS = ("fp32", "bf16", "fp16", "bf16_params")
LOSSES = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "ipo_sum",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "discopop",
    "apo_zero",
    "apo_down",
    "sft",
    "cpo",
    "simpo",
    "orpo",
)
"""The losses over pairs, which may be mixed."""
SMOOTHED = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "exo_pair",
    "aot",
    "aot_unpaired",
    "cpo",
    "simpo",
)
"""The losses for which label smoothing is defined."""
LIKELIHOODS = ("sft",)
"""The losses that are a likelihood alone: in a mix, modifiers do not apply to them."""
BARE = ("sft", "cpo", "simpo", "orpo")
"""The losses that read no reference."""
KTO = "kto"
"""The loss over unpaired completions."""
CALLED = {
    "dpo": "it is 'sigmoid'",
    "cdpo": "it is 'sigmoid' with label_smoothing",
    "rpo": "it is a mix of 'sigmoid' and 'sft'",
    "slic": "it is 'hinge'",
    "rso": "it is 'hinge'",
    "tr_dpo": "it is any loss with a reference, with reference_mixup",
    "ld_dpo": "it is 'sigmoid' with ld_alpha",
}
"""Names of methods elsewhere, and what they are here."""
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
LAYOUTS = ("padded", "padding_free", "shared_prompt")
MULTIPLE = 8
"""The default multiple, in tokens, to which rows are padded."""
TRUNCATIONS = ("keep_start", "keep_end", "prompt_first")
OPTIMIZERS = {
    "adamw": ("weight_decay", "betas", "eps"),
    "adam": ("weight_decay", "betas", "eps"),
    "adamw_8bit": ("weight_decay", "betas", "eps"),
    "sgd": ("weight_decay", "momentum"),
    "adafactor": ("weight_decay",),
    "muon": ("weight_decay", "momentum"),
}
"""The options of each optimizer."""
SCHEDULES = {
    "constant": (),
    "constant_with_warmup": ("warmup",),
    "linear": ("warmup", "total"),
    "cosine": ("warmup", "total", "cycles", "min_lr"),
    "cosine_with_min_lr": ("warmup", "total", "cycles", "min_lr"),
    "cosine_with_restarts": ("warmup", "total", "cycles"),
    "polynomial": ("warmup", "total", "power", "end"),
    "inverse_sqrt": ("warmup", "timescale"),
    "warmup_stable_decay": ("warmup", "total", "decay", "min_ratio"),
    "step": ("every", "gamma"),
    "multistep": ("milestones", "gamma"),
    "exponential": ("gamma",),
    "one_cycle": ("total",),
    "reduce_on_plateau": ("factor", "patience", "min_lr"),
}
"""The options of each schedule here."""
REQUIRED = {
    "cosine_with_min_lr": ("min_lr",),
    "warmup_stable_decay": ("decay",),
    "step": ("every",),
    "multistep": ("milestones",),
    "exponential": ("gamma",),
}
"""The options without a default; `total` has one here, train.steps."""
DEVICES = ("cpu", "cuda")
TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
TOKEN_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
TOKEN_FILES = (".bin", ".npy")
EMBEDDED = "embedded"
