"""Who imports whom: the layout of the project as a reader may rely on it."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = {"ldm", "controlnet", "tools", "train", "infer"}
PACKAGES = {"torch", "torchvision", "PIL", "numpy", "einops", "safetensors", "tqdm"}
OPTIONAL = {"controlnet_aux"}  # learned detectors, imported when one is asked for
PEERS = {"bench_peers.py": {"diffusers", "transformers"}}  # what the measurements are beside
STANDARD_LIBRARY = sys.stdlib_module_names

# A file imports only from files above it.
LDM_IN_READING_ORDER = [
    "config",
    "files",
    "schedule",
    "attention",
    "blocks",
    "unet",
    "vae",
    "vae_in_strips",
    "tokenizer",
    "text_encoder",
    "samplers",
    "key_maps",
    "mapped",
    "pickles",
    "checkpoint",
    "diffusers_layout",
    "recognise",
    "stable_diffusion",
    "onednn",
    "packed",
    "__init__",
]


def sources(*folders):
    """The Python files in these folders and below."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def programs():
    """The files at the top: train.py, infer.py and whatever comes to them."""
    return sorted(ROOT.glob("*.py"))


def imports(path):
    """The full names of all modules that a file imports, at its top or inside a function."""
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


def top_level_imports(path):
    return {name.split(".")[0] for name in imports(path)}


def test_the_base_knows_nothing_of_control():
    assert sources("ldm")
    for path in sources("ldm"):
        assert top_level_imports(path) & OWN <= {"ldm"}, path


def test_the_method_knows_nothing_of_the_programs():
    assert sources("controlnet")
    for path in sources("controlnet"):
        assert top_level_imports(path) & OWN <= {"ldm", "controlnet"}, path


def test_nobody_imports_train_and_infer():
    for path in [*sources("tools"), *programs()]:
        assert not top_level_imports(path) & {"train", "infer"}, path


def test_a_file_of_ldm_imports_only_from_files_above_it():
    files = {path.stem: path for path in sources("ldm")}
    assert files.keys() == set(LDM_IN_READING_ORDER)
    for i, name in enumerate(LDM_IN_READING_ORDER):
        above = LDM_IN_READING_ORDER[:i]
        for imported in imports(files[name]):
            package, _, rest = imported.partition(".")
            if package == "ldm":
                assert rest.split(".")[0] in above, f"{name}.py imports {imported}"


def test_only_the_required_packages_are_imported():
    for path in [*sources("ldm", "controlnet", "tools"), *programs()]:
        foreign = top_level_imports(path) - OWN - PACKAGES - OPTIONAL - STANDARD_LIBRARY - PEERS.get(path.name, set())
        assert not foreign, f"{path} imports {foreign}"


def test_requirements_txt_names_the_required_packages():
    """PIL comes with torchvision, and pytest is for the tests alone."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line).group() for line in lines if line and not line.startswith("#")}
    assert required == (PACKAGES - {"PIL"}) | {"pytest"}
