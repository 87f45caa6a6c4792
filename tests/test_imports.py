"""The library keeps its shape: who may import whom, what importing does, and how a file looks.

Each rule is a function from (module name, source) to the list of problems, so that the rules themselves are tested
on small sources with one planted violation.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lensmini").rglob("*.py"))
SIBLINGS = {"nn", "objectives", "data", "rewards", "prompting", "sampling"}
SHARED = {"shapes", "segments", "packed", "paths", "averaging", "cost", "endpoint", "reduction", "words"}
NEVER = {"experiments", "benchmarks", "tests", "tyro", "tqdm", "rich", "wandb", "tensorboard", "loguru"}
EXTRAS = {
    "xformers": "xformers",
    "diffusers": "diffusers",
    **dict.fromkeys(["pyarrow", "webdataset", "faiss", "timm"], "data"),
    **dict.fromkeys(["openai", "pydantic", "tenacity", "json_repair"], "endpoints"),
    "peft": "lora",
    "torchao": "fp8",
    "ray": "ray",
}
HEAVY = {*EXTRAS, "transformers", "torchvision", "matplotlib", "skimage", "scipy", "huggingface_hub"}
EFFECTS = {"environ", "getenv", "putenv", "print", "manual_seed", "seed", "device_count", "is_available"}
EFFECTS |= {"set_default_dtype", "set_default_device", "set_num_threads", "set_num_interop_threads", "basicConfig"}
EFFECTS |= {"set_float32_matmul_precision", "use_deterministic_algorithms", "set_grad_enabled", "filterwarnings"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk(node: ast.AST, *, bodies: bool = True, type_checking: bool = True) -> Iterator[ast.AST]:
    """All nodes below; without function bodies, or without what only a type checker reads, if so asked."""
    for name, field in ast.iter_fields(node):
        if name == "body":
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if (function and not bodies) or (typing and not type_checking):
                continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield child
                yield from walk(child, bodies=bodies, type_checking=type_checking)


def imports(name: str, tree: ast.AST, package: bool = False, **which: bool) -> Iterator[str]:
    """Dotted names of everything imported, also relatively, by import_module, or as an attribute of torch."""
    for node in walk(tree, **which):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield ast.unparse(node)


def import_problems(name: str, source: str, package: bool = False) -> list[str]:
    """Dependency rules 1 to 3."""
    tree, problems = ast.parse(source), []
    room = [*name.split("."), ""][1]
    for target in imports(name, tree, package):
        top, inner = [*target.split("."), ""][:2]
        if top in NEVER:
            problems.append(f"{name} imports {target}: the library stands alone")
        if target.split(".")[:2] == ["torch", "distributed"] and room != "parallel":
            problems.append(f"{name} uses {target}: only parallel.py may")
        if top == "lensmini" and room in SIBLINGS and inner not in SHARED | {room, "__version__"}:
            problems.append(f"{name} imports {target}: siblings share the small top files only")
        if top in EXTRAS and f"lensmini[{EXTRAS[top]}]" not in source:
            problems.append(f"{name} imports {target} and nowhere names the extra lensmini[{EXTRAS[top]}]")
    for target in imports(name, tree, package, type_checking=False):
        if target.startswith("lensmini.") and room in SHARED and target.split(".")[1] not in SHARED:
            problems.append(f"{name} imports {target}: a shared file that does so joins siblings")
    for target in imports(name, tree, package, bodies=False, type_checking=False):
        if target.split(".")[0] in HEAVY:
            problems.append(f"{name} imports {target} at the top of the module")
    return problems


def effect_problems(name: str, source: str) -> list[str]:
    """Dependency rule 4, as far as the source shows it: nothing outside functions reads or sets the world."""
    problems = []
    for node in walk(ast.parse(source), bodies=False):
        # A field of a dataclass may have any name; only reading one can touch the world.
        read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        used = node.attr if isinstance(node, ast.Attribute) else node.id if read else ""
        device = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.device"
        if used in EFFECTS or device or ast.unparse(node) == "torch.compile":
            problems.append(f"{name}: {ast.unparse(node)} while importing")
    return problems


LONG = {"lensmini.pipeline.call": 420}  # one class with diffusers' argument list and a line on every argument


def form_problems(name: str, source: str) -> list[str]:
    """What every file looks like: one concept, a name that says which, ``__all__``, documented with an example."""
    tree, problems = ast.parse(source), []
    if not source.isascii():
        problems.append(f"{name}: not ASCII")
    most = LONG.get(name, 350)
    if len(source.splitlines()) > most:
        problems.append(f"{name}: {len(source.splitlines())} lines, more than {most}")
    if VAGUE & {word for part in name.split(".") for word in part.split("_")}:
        problems.append(f"{name}: says nothing about its content")
    if not tree.body:
        return problems
    if not ast.get_docstring(tree):
        problems.append(f"{name}: no module docstring")
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets)
    ]
    if len(exported) != 1:
        return [*problems, f"{name}: no __all__"]
    bound = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    bound |= {ast.unparse(t) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    bound |= {ast.unparse(n.target) for n in tree.body if isinstance(n, ast.AnnAssign)}
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for public in exported[0]:
        if public in defined:
            document = ast.get_docstring(defined[public]) or ""
            bases = {ast.unparse(base) for base in getattr(defined[public], "bases", [])}
            if not document or (">>> " not in document and not bases & {"NamedTuple", "Protocol"}):
                problems.append(f"{name}.{public}: no docstring with an example")
        elif public not in bound and "__getattr__" not in defined:
            problems.append(f"{name}: __all__ names {public}, which is not there")
    return problems


@pytest.mark.parametrize("path", FILES, ids=module_name)
@pytest.mark.parametrize("rule", [import_problems, effect_problems, form_problems], ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rules(path, rule):
    package = {"package": path.name == "__init__.py"} if rule is import_problems else {}
    assert rule(module_name(path), path.read_text(encoding="utf-8"), **package) == []


def test_there_is_something_to_check():
    assert {"lensmini", "lensmini.shapes", "lensmini.packed"} <= {module_name(path) for path in FILES}
    assert (ROOT / "lensmini" / "py.typed").exists()


def function(body: str) -> str:
    return f"def load():\n    {body}\n"


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("lensmini.nn.mlp", "from lensmini.sampling import time_grid", "siblings"),
        ("lensmini.nn.mlp", function("import lensmini.data.buckets"), "siblings"),
        ("lensmini.objectives.times", "from ..nn import mlp", "siblings"),
        ("lensmini.objectives.times", "from lensmini import nn", "siblings"),
        ("lensmini.sampling", "from lensmini.pipeline import LensPipeline", "siblings"),
        ("lensmini.sampling", "from .nn import LensTransformer", "siblings"),
        ("lensmini.rewards.judges", "if TYPE_CHECKING:\n    from lensmini.nn import LensConfig", "siblings"),
        ("lensmini.rewards.judges", 'import importlib\nimportlib.import_module("lensmini.nn")', "siblings"),
        ("lensmini.cost", "from lensmini.nn import LensConfig", "joins siblings"),
        ("lensmini.pipeline.call", "import experiments.pretrain", "stands alone"),
        ("lensmini.checkpoints.transformer", function("from tqdm import tqdm"), "stands alone"),
        ("lensmini.nn.attention", "import torch.distributed as dist", "only parallel.py"),
        ("lensmini.nn.attention", function("from torch import distributed"), "only parallel.py"),
        ("lensmini.averaging", "import torch\nrank = lambda: torch.distributed.get_rank()", "only parallel.py"),
        ("lensmini.nn.autoencoder", "import diffusers  # lensmini[diffusers]", "at the top"),
        ("lensmini.nn.autoencoder", "try:\n    import torchvision\nexcept ImportError:\n    pass", "at the top"),
        ("lensmini.nn.autoencoder", "class A:\n    from transformers import AutoModel", "at the top"),
        ("lensmini.nn.autoencoder", function("import diffusers"), "names the extra"),
        ("lensmini.endpoint", function("import openai  # lensmini[data]"), "names the extra"),
    ],
)
def test_a_forbidden_import_is_found(name, source, word):
    assert word in " ".join(import_problems(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lensmini.nn.mlp", "from lensmini.nn.norm import RMSNorm\nfrom lensmini.shapes import check_shape"),
        ("lensmini.nn.mlp", "from .norm import RMSNorm\nfrom ..packed import Layout\nfrom lensmini import paths"),
        ("lensmini.pipeline.call", "from lensmini import nn, sampling\nfrom .checkpoints import load_transformer"),
        ("lensmini.parallel", "import torch.distributed as dist\nfrom torch.distributed import fsdp"),
        ("lensmini.cost", "if TYPE_CHECKING:\n    from lensmini.nn import LensConfig"),
        ("lensmini.nn.text_encoder", function("from transformers import AutoModel")),
        ("lensmini.nn.autoencoder", function('import diffusers  # "pip install lensmini[diffusers]"')),
        ("lensmini.nn.autoencoder", "if TYPE_CHECKING:\n    import diffusers  # lensmini[diffusers]"),
    ],
)
def test_an_allowed_import_is_not_reported(name, source):
    assert import_problems(name, source) == []


def test_a_package_resolves_its_relative_imports_from_itself():
    assert import_problems("lensmini.nn", "from .mlp import SwiGLU\nfrom ..shapes import x", package=True) == []
    assert "siblings" in " ".join(import_problems("lensmini.nn", "from ..sampling import x", package=True))


@pytest.mark.parametrize(
    "source",
    [
        "import os\nDEBUG = os.environ.get('DEBUG')",
        "import torch\ntorch.set_default_dtype(torch.bfloat16)",
        "import torch\nDEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'",
        "import torch\n@torch.compile\ndef f(x):\n    return x",
        "class A:\n    torch.manual_seed(0)",
        "import torch\nDEVICE = torch.device('cuda')",
        "def f(debug=os.getenv('DEBUG')):\n    return debug",
    ],
)
def test_an_effect_of_importing_is_found(source):
    assert effect_problems("lensmini.x", source) != []


def test_effects_inside_functions_are_their_own_business():
    source = "import re, torch\nWORD = re.compile('a')\ndef f(x: torch.device):\n    return torch.compile(print(x))"
    assert effect_problems("lensmini.x", source) == []


GOOD = '"""One thing."""\n\n__all__ = ["f"]\n\n\ndef f():\n    """Do it.\n\n    >>> f()\n    """\n'


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("lensmini.x", GOOD.replace("One", "\u00d6ne"), "ASCII"),
        ("lensmini.x", GOOD + "\n" * 350, "350"),
        ("lensmini.nn.mlp_utils", GOOD, "content"),
        ("lensmini.common.x", GOOD, "content"),
        ("lensmini.x", GOOD.replace("__all__", "ALL"), "__all__"),
        ("lensmini.x", GOOD.replace('["f"]', '["f", "g"]'), "not there"),
        ("lensmini.x", GOOD.replace(">>>", "..."), "example"),
        ("lensmini.x", GOOD.replace('"""One thing."""', ""), "module docstring"),
    ],
)
def test_a_file_out_of_form_is_found(name, source, word):
    assert form_problems("lensmini.x", GOOD) == []
    assert word in " ".join(form_problems(name, source))


PROBE = """
import importlib, json, os, random, sys
import einops, numpy, torch

def world():
    return dict(
        dtype=str(torch.get_default_dtype()), device=str(torch.get_default_device()),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()), grad=torch.is_grad_enabled(),
        deterministic=(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        precision=torch.get_float32_matmul_precision(), benchmark=torch.backends.cudnn.benchmark,
        tf32=(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        random=(torch.get_rng_state().sum().item(), hash(random.getstate()), numpy.random.get_state()[1].sum().item()),
        cuda=torch.cuda.is_initialized(), environ=dict(os.environ),
    )

heavy, modules, before, problems = set(sys.argv[1].split()), sys.argv[2].split(), world(), []
heavy -= set(sys.modules)
for module in modules:
    importlib.import_module(module)
    found = heavy & set(sys.modules)
    problems += [f"importing {module} imports {name}" for name in sorted(found)]
    heavy -= found
    after = world()
    problems += [f"importing {module} changes {key} to {after[key]}" for key in after if after[key] != before[key]]
    before = after
print(json.dumps(problems))
"""


def probe(*modules: str, path: Path = ROOT) -> list[str]:
    """Import modules one after the other in a fresh interpreter and report what else that did."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, " ".join(HEAVY | {"tyro", "tqdm", "rich", "wandb"}), " ".join(modules)],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_does_nothing():
    assert probe(*(module_name(path) for path in FILES)) == []


def test_an_import_that_does_something_is_found(tmp_path):
    (tmp_path / "loud.py").write_text("import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)\nimport rich\n")
    assert [problem.split()[:4] for problem in probe("loud", path=tmp_path)] == [
        ["importing", "loud", "imports", "rich"],
        ["importing", "loud", "changes", "threads"],
    ]
