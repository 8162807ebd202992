"""Who imports whom: the layout of the project as a reader may rely on it."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = {"ldm", "controlnet", "tools", "train", "infer"}
PACKAGES = {"torch", "torchvision", "PIL", "numpy", "einops", "safetensors", "tqdm"}
OPTIONAL = {"controlnet_aux", "gradio", "huggingface_hub"}  # imported when what needs them is asked for
PEERS = {"bench_peers.py": {"diffusers", "transformers"}}  # what the measurements are beside
STANDARD_LIBRARY = sys.stdlib_module_names

# A wing imports from itself and from those above it. A wing is a folder, or the files of a folder.
RANKS = (
    ("ldm",),
    ("controlnet/common",),
    ("controlnet/hints",),
    ("controlnet/worlds",),
    ("controlnet",),  # the method
    ("controlnet/inference",),
    ("controlnet/training",),
    ("tools", "train.py", "infer.py"),
)
# Inside ldm/: the model, its checkpoints, what makes it faster. StableDiffusion puts them under one roof.
MODEL = {
    "config",
    "schedule",
    "attention",
    "blocks",
    "unet",
    "vae",
    "tokenizer",
    "text_encoder",
    "samplers",
    "timesteps",
}


def sources(*folders):
    """The Python files in these folders and below."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def files_of(wing):
    """A file alone; the files of a folder, with those below it unless they are wings of their own."""
    if wing.endswith(".py"):
        return [ROOT / wing]
    wings = {name for rank in RANKS for name in rank}
    inner = [ROOT / name for name in wings if name.startswith(f"{wing}/")]
    return [path for path in sources(wing) if not any(path.is_relative_to(folder) for folder in inner)]


def imports(path):
    """The full names of all that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).parent.parts
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def module_file(name):
    """The file of the project that `name`, a module or something in one, stands in; None for other packages."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


RANK_OF = {path: i for i, rank in enumerate(RANKS) for wing in rank for path in files_of(wing)}


def top_level_imports(path):
    return {name.split(".")[0] for name in imports(path)}


ALL = [path for rank in RANKS for wing in rank for path in files_of(wing)]


def test_every_file_has_one_rank():
    assert len(ALL) == len(set(ALL))
    assert set(ALL) == {*sources("ldm", "controlnet", "tools"), *ROOT.glob("*.py")}


@pytest.mark.parametrize("wing", [wing for rank in RANKS for wing in rank])
def test_imports_run_one_way(wing):
    assert files_of(wing)
    for path in files_of(wing):
        for name in imports(path):
            file = module_file(name)
            # controlnet/__init__.py offers names of the notebook from below it, when they are asked for.
            if file is not None and path != ROOT / "controlnet" / "__init__.py":
                assert RANK_OF[file] <= RANK_OF[path], f"{path.relative_to(ROOT)} imports {name}"


def test_nobody_imports_train_and_infer():
    for path in ALL:
        assert not top_level_imports(path) & {"train", "infer"}, path


def test_the_model_knows_neither_its_files_nor_what_makes_it_faster():
    for name in MODEL:
        own = [imported for imported in imports(ROOT / "ldm" / f"{name}.py") if imported.startswith("ldm")]
        assert all(imported.split(".")[1] in MODEL for imported in own), name
    for path in sources("ldm/checkpoints"):
        assert not any(name.startswith("ldm.fast") for name in imports(path)), path
    for path in sources("ldm/fast"):
        assert not any(name.startswith("ldm.checkpoints") for name in imports(path)), path


def test_a_reader_of_the_model_meets_no_files_and_one_of_a_control_no_sampling():
    """What the method's own files import of ldm/ is the model; only checkpoint.py and layouts.py know of files."""
    for name in ("config", "model", "objective", "guidance", "reuse", "ablations"):
        for imported in imports(ROOT / "controlnet" / f"{name}.py"):
            assert not imported.startswith(("ldm.checkpoints", "ldm.fast", "controlnet.training")), (
                f"{name}: {imported}"
            )


def test_only_the_required_packages_are_imported():
    for path in ALL:
        foreign = top_level_imports(path) - OWN - PACKAGES - OPTIONAL - STANDARD_LIBRARY - PEERS.get(path.name, set())
        assert not foreign, f"{path} imports {foreign}"


def test_requirements_txt_names_the_required_packages():
    """PIL comes with torchvision, and pytest is for the tests alone."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line).group() for line in lines if line and not line.startswith("#")}
    assert required == (PACKAGES - {"PIL"}) | {"pytest"}
