"""The layers: imports point one way, and the import of the package needs the core alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import functrain

PACKAGE = Path(functrain.__file__).parent
LAYERS = [
    "errors",
    "checks",
    "writing",
    "memory",
    "accumulators",
    "norms",
    "trees",
    "keys",
    "quirks",
    "reachable",
    "separable",
    "architecture",
    "descriptions",
    "deferred",
    "selective",
    "activations",
    "compilation",
    "lora",
    "metrics",
    "precision",
    "schedules",
    "guards",
    "optimizers",
    "state",
    "objectives",
    "reductions",
    "sums",
    "clipping",
    "forward",
    "gradients",
    "distributed",
    "agreement",
    "forms",
    "steps",
    "stages",
    "evaluation",
    "flops",
    "data",
    "references",
    "checkpoint",
    "loop",
    "models",
    "planning",
    "tracking",
    "testing",
    "cli",
    "__main__",
]
CORE = {"torch", "numpy", "attrs", "safetensors", "orjson"}
# What an extra brings is imported inside functions of these layers only.
EXTRAS = {
    "cli": {"tyro", "cattrs", "rich", "jinja2"},
    "tracking": {"rich", "jinja2"},
    "testing": {"hypothesis"},
    "models": {"transformers", "huggingface_hub"},
    "data": {"transformers", "tokenizers", "jinja2", "pyarrow"},
}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every imported module with whether it is imported inside a function."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            within = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                if child.module == "functrain":
                    found.extend((f"functrain.{alias.name}", inside) for alias in child.names)
                else:
                    found.append((child.module, inside))
            walk(child, within)

    walk(tree, False)
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_layers_above(path: Path) -> None:
    own = LAYERS.index(_layer(path))
    for name, _ in _imports(ast.parse(path.read_text())):
        if name == "functrain.__version__":
            continue
        if name.startswith("functrain."):
            layer = name.split(".")[1]
            assert layer in LAYERS, f"{name} is in no layer"
            assert LAYERS.index(layer) <= own, f"{path.name} imports {name}, a layer below it"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_imports_are_declared(path: Path) -> None:
    for name, inside in _imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in CORE or top == "functrain":
            continue
        allowed = EXTRAS.get(_layer(path), set())
        assert top in allowed, f"{path.name} imports {top}, which is in no extra of its layer"
        in_types = f"if TYPE_CHECKING:\n    from {top}" in path.read_text()
        assert inside or _layer(path) == "cli" or in_types, f"{path.name}: import {top} lazily"


def test_nothing_is_pickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(n.split(".")[0] in ("pickle", "dill") for n in names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                call = f"{node.value.id}.{node.attr}"
                assert call not in ("torch.save", "torch.load"), f"{path}: {call}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}: {node.func.id}"


BLOCKED = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_core_trains_where_no_extra_is_installed_and_imports_no_compiler(
    tmp_path: Path,
) -> None:
    """The compiler takes nearly as long to import as all of torch."""
    extras = {"tyro", "cattrs", "rich", "jinja2", "hypothesis", "transformers", "pyarrow"}
    _run(
        BLOCKED.format(blocked=extras)
        + """
import functrain as ft, torch
for name in ft.__all__:
    getattr(ft, name)
from torch import nn
architecture, params, buffers = ft.split(nn.Sequential(nn.Embedding(5, 5)))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Embedding(5, 5)
    def forward(self, input_ids): return self.head(input_ids)
architecture, params, buffers = ft.split(Model())
step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
ids = torch.arange(5).repeat(2, 1)
state, metrics = step(step.init(params, buffers), {"input_ids": ids, "labels": ids})
assert float(metrics["num_tokens"]) == 8
"""
        + f"ft.load(ft.save({str(tmp_path)!r}, state), like=state)\n"
        + "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()\n"
    )


def test_importing_the_package_imports_no_torch() -> None:
    _run("import functrain, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules")


def test_every_public_name_is_there_and_documented() -> None:
    for name in functrain.__all__:
        thing = getattr(functrain, name)
        assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    assert set(functrain.__all__) <= set(dir(functrain))
