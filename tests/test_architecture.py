"""The import directions and other rules that the source itself must obey, read from its syntax."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flowgrpo_jax"
ENTRY_POINTS = {"train", "evaluate", "generate", "export", "encode", "compile", "serve"}


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def dotted(file):
    """flowgrpo_jax/models/vae.py -> models.vae"""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


CONFIGS = PACKAGE / "configs"  # a link to the recipes, which are no code of the package
PYTHON = [file for file in sorted(PACKAGE.rglob("*.py")) if not file.is_relative_to(CONFIGS)]
FILES = {dotted(file): file for file in PYTHON}


def imports(module):
    """Every dotted name that a module imports, at its top or later: `from a import b` is a.b."""
    return imports_of(FILES[module])


def imports_of(file):
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def libraries(module):
    return {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)


def own(module):
    """The modules of the package that a module imports."""
    prefix = "flowgrpo_jax."
    names = {name.removeprefix(prefix) for name in imports(module) if name.startswith(prefix)}
    return {name if name in FILES else name.rpartition(".")[0] for name in names} - {""}


def part(module):
    """models.vae -> models"""
    return module.partition(".")[0]


def test_the_reader_reads():
    assert {"sampling.sde", "models.vae", "scoring.host", "worlds.shapes.grammar"} <= set(FILES)
    assert {"sampling.sde", "sharding", "models.lora"} <= own("assembly.parts")
    assert "flax.nnx" in imports("models.vae") and "jax" in libraries("sampling.sde")


@pytest.mark.parametrize(
    "module",
    [
        "sampling.sde",
        "sampling.excess_noise",
        "advantages.group",
        "algorithms.grpo",
        "algorithms.nft",
    ],
)
def test_the_mathematics_imports_only_jax(module):
    assert libraries(module) <= {"jax", "numpy", "flowgrpo_jax"}


def test_imports_have_a_direction():
    """No cycle, and nothing imports what is above it."""
    list(TopologicalSorter({module: own(module) for module in FILES}).static_order())
    folders = {part(module): set() for module in FILES}
    for module in FILES:
        folders[part(module)] |= {part(m) for m in own(module)} - {part(module)}
    list(TopologicalSorter(folders).static_order())
    layers = [
        {"types", "tables", "seeds", "sharding", "configs"},
        {"storage", "sampling", "scoring"},
        {"models", "detection", "transport", "advantages", "monitors", "compilation"},
        {"command_line"},
        {"checkpoints", "algorithms"},
        {"update", "report", "worlds"},
        {"programs", "rewards"},
        {"prompts"},
        {"regularisation"},
        {"assembly"},
        {"costs"},
        ENTRY_POINTS | {"training"},
    ]
    height = {name: i for i, layer in enumerate(layers) for name in layer} | {"": 0}
    for module in FILES:
        above = {m for m in own(module) if height[part(m)] > height[part(module)]}
        assert not above, f"{module} imports {above}"


def test_models_do_not_know_the_rewards():
    """A reward may be built on a tower of `models`; never the other way round."""
    for module in FILES:
        if part(module) == "models":
            assert not {"rewards", "scoring"} & {part(m) for m in own(module)}


def test_the_trainer_does_not_know_the_parts_of_sd3():
    """What one architecture has of its own is named in its folder alone."""
    part_of_sd3 = re.compile(r"sd3|mmdit|pooled|text_encoder|tokenizer_|clip_[lg]\b|\bt5", re.I)
    for module in FILES:
        if part(module) not in ("models", "worlds", "rewards"):
            named = {n for n in names(module) if part_of_sd3.search(n)}
            assert not named, f"{module} names {named}"


def names(module):
    """The names and strings of a module, without its docstrings."""
    found, documents = set(), set()
    for node in ast.walk(tree(FILES[module])):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            documents.add(ast.get_docstring(node, clean=False))
        found |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")}
        if isinstance(node, ast.Constant):
            found.add(node.value)
    return {name for name in found - documents if isinstance(name, str) and " " not in name}


def test_modules_end_at_the_models():
    users = {module for module in FILES if any(n.startswith("flax.nnx") for n in imports(module))}
    assert all(m.startswith(("models.", "worlds.pretraining.")) for m in users)


def test_recipes_import_recipes_alone():
    """By the name that they have in a checkout and where the package is installed."""
    recipes = list(CONFIGS.glob("*.py")) + list(CONFIGS.glob("*/*.py"))
    assert {"base.py", "nft.py"} <= {file.name for file in recipes}
    for file in recipes:
        others = {name for name in imports_of(file) if not name.startswith("flowgrpo_jax.configs.")}
        assert {name.partition(".")[0] for name in others} <= {"ml_collections"}, file


def test_configs_stop_at_the_entry_points():
    users = {module for module in FILES if libraries(module) & {"ml_collections", "absl"}}
    checkers = {module for module in FILES if part(module) in ("assembly", "command_line")}
    assert users <= ENTRY_POINTS | checkers


def test_only_sharding_names_a_mesh_axis():
    def strings(module):
        nodes = ast.walk(tree(FILES[module]))
        return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}

    assert [module for module in FILES if "fsdp" in strings(module)] == ["sharding"]


def test_training_needs_no_torch():
    """Only the scorers that exist for torch alone may ask for it, when they are called."""
    torch = {"torch", "diffusers", "peft", "accelerate", "torchvision"}
    scorers = {"detection.mask2former", "detection.clip_colors"}
    assert {module for module in FILES if libraries(module) & torch} == scorers
    for module in scorers:
        top = [n for n in tree(FILES[module]).body if isinstance(n, ast.Import | ast.ImportFrom)]
        named = {ast.unparse(node).split()[1].partition(".")[0] for node in top}
        assert not named & (torch | {"transformers"})


def test_every_module_says_what_it_is_for():
    assert not [m for m, f in FILES.items() if tree(f).body and not ast.get_docstring(tree(f))]


def test_no_file_is_longer_than_300_lines():
    """Neither one of the package nor a test, benchmark or recipe."""
    others = [f for folder in ("tests", "benchmarks", "configs") for f in files_in(folder)]
    lengths = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in PYTHON + others}
    assert len(others) > 100
    assert not {file: lines for file, lines in lengths.items() if lines > 300}


def files_in(folder):
    return sorted((PACKAGE.parent / folder).rglob("*.py"))


def test_the_page_on_the_architecture_names_every_file_and_folder():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py"}
    names |= {f"{part(module)}/" for module in FILES if "." in module}
    assert not {name for name in names if f"`{name}`" not in page}
