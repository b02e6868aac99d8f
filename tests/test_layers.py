"""The map of the library: imports point down only, read from the source with `ast`, also those inside functions."""
import ast

import pytest
from conftest import PROJECT

LIBRARY = PROJECT / "rlhfkit"
LAYERS = {
    0: "records formats forms duplicates joins sources corpus tasks samples",
    1: "families encodings miniature models tokenizers",
    2: "rows packing cache configs zero engine states saving rl sampling decode rollout rewards experience health overoptimisation memory kernels slots trainer",
    3: "stages",
    4: "launcher bench evaluation plots plots_rl",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
HEAVY = {"torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets"}     # never in layer 0
FILES = {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
         for path in sorted(LIBRARY.rglob("*.py"))}
MODULES = [name for name in FILES if name != "rlhfkit"]


def imported(module):
    """Names of all modules that a file of the library imports, as precise as the import is: `rlhfkit.rows`."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in FILES else node.module for name in full}
    return names


def part(name):
    return name.split(".")[1]


def test_every_module_has_its_layer():
    assert {part(name) for name in MODULES} == set(LAYER), "a new module needs a place in the map"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    inside = {name for name in imported(module) if name.split(".")[0] == "rlhfkit"}
    assert "rlhfkit" not in inside, f"{module} imports the package's public face; import the module that has the name"
    up = {name for name in inside if LAYER[part(name)] > LAYER[part(module)]}
    assert not up, f"{module} (layer {LAYER[part(module)]}) imports {', '.join(sorted(up))} from above"


@pytest.mark.parametrize("module", [name for name in MODULES if LAYER[part(name)] == 0])
def test_what_handles_text_needs_no_torch(module):
    hub = {"datasets"} if module == "rlhfkit.formats" else set()        # inside the functions that read a saved or a hub's data set
    assert not {name.split(".")[0] for name in imported(module)} & HEAVY - hub


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ("models", "tokenizers")])
def test_families_know_models_and_tokenizers_and_not_the_other_way(module):
    assert not {name for name in imported(module) if name.startswith("rlhfkit.families")}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("rlhfkit.stages.")])
def test_a_stage_never_imports_another(module):
    assert not {name for name in imported(module) if name.startswith("rlhfkit.stages")}
