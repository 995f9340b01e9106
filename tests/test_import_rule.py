"""The import rule: `core` <- `peft`, `engine`, `learner` <- `vllm`, `megatron` <- `verl`, `cli`, `bench`. Arrows never
point back.

Checked on the source of every module, imports inside functions included, so that a module that no test loads is checked
too. That the checker itself catches violations is tested on made-up modules.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "verl_pte"

# What each part may import of the package, itself included. A new part has to be entered here.
MAY_IMPORT = {
    "core": {"core"},
    "patches.version_guard": set(),
    "patches.peft_type": {"patches.version_guard"},
    "versions": {""},
    "config": {"core", "patches.peft_type", "versions"},
    "peft": {"core", "config", "peft"},
    "engine": {"core", "config", "peft", "engine"},
    "learner": {"core", "config", "peft", "learner"},
    "run_claim": set(),
    "distill": {"core", "config", "peft", "engine", "learner", "run_claim", "distill"},
    "plan": {"core", "config", "peft", "engine", "learner", "plan"},
    "export": {"config", "peft", "distill", "versions", "export"},
    "rewards": {"rewards"},
    "data": {"rewards", "data"},
    "eval": {"core", "config", "peft", "engine", "rewards", "data", "run_claim", "eval"},
    "vllm": {"core", "config", "peft", "engine", "vllm"},
    "megatron": {"core", "config", "peft", "learner", "megatron"},
    "verl": {"core", "config", "peft", "engine", "learner", "megatron", "patches", "vllm", "verl"},
    "doctor": {"", "doctor"},
    "doctor.torch_probe": {"core", "doctor"},
    "doctor.self_test": {"", "config", "peft", "engine", "learner", "doctor"},
    "doctor.verl_probe": {"verl", "doctor"},
    "doctor.vllm_probe": {"vllm", "doctor"},
    "cli": {"core", "config", "peft", "engine", "data", "distill", "doctor", "eval", "export", "plan", "vllm", "cli"},
    "bench": {
        "",
        "core",
        "config",
        "peft",
        "engine",
        "learner",
        "distill",
        "plan",
        "vllm",
        "bench",
    },  # names the version it measured
    "bench.verl_baseline": {"bench"},
    "patches": {"patches"},  # patches of verl: the bottom layer, the plugin hands them what they call
    "": set(),  # verl_pte/__init__.py names its public parts as strings and loads them on use
}
OPTIONAL = {
    "verl",
    "ray",
    "vllm",
    "megatron",
    "flash_attn",
    "tensordict",
    "hydra",
    "omegaconf",
    "transfer_queue",
    "datasets",
}
# Of those, what each part may import; a part that is not named here may import none.
MAY_IMPORT_OPTIONAL = {
    "core": {"flash_attn"},  # where it is used: the first call of a model that has it
    "engine": {"flash_attn"},  # likewise
    "data": {"datasets"},  # where a hub set is read
    "vllm": {"vllm"},
    "megatron": {"megatron"},
    "bench": {"vllm"},
    "bench.verl_baseline": {"verl", "tensordict"},  # loaded where verl is, for what is measured beside ours
    "doctor.torch_probe": {
        "flash_attn"
    },  # probes: each in a process of its own, so that what is broken breaks it alone
    "doctor.verl_probe": OPTIONAL,
    "doctor.vllm_probe": {"vllm"},
    "verl": OPTIONAL,
    "patches": OPTIONAL,
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path
    for path in sorted((ROOT / "patches").glob("*.py")):
        yield f"{PACKAGE}.patches.{path.stem}".removesuffix(".__init__"), path


def part_of(module: str) -> str:
    """The key of MAY_IMPORT that covers a module of the package: the longest that is its prefix."""
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    covering = [part for part in MAY_IMPORT if part and (inner == part or inner.startswith(part + "."))]
    if inner and not covering:
        raise AssertionError(f"{module}: a new part of the package; say in MAY_IMPORT what it may import")
    return max(covering, key=len, default="")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names a module imports anywhere; ``from a import b`` gives ``a.b``, relative imports are resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in a module breaks the rule, as sentences."""
    part, out = part_of(module), []
    for name in sorted(imports(source, module, is_package)):
        top = name.split(".")[0]
        if top == PACKAGE and name != f"{PACKAGE}.__version__":
            target = part_of(_known_prefix(name))
            allowed = MAY_IMPORT[part]
            if target != part and target not in allowed and not (target.split(".")[0] in allowed and target):
                out.append(f"{module} ({part or 'package'}) imports {name} ({target or 'package'})")
        if top in OPTIONAL - MAY_IMPORT_OPTIONAL.get(part, set()):
            out.append(f"{module} imports {name}, but has to run without {top}")
        if part == "core" and top == "transformers" and module != f"{PACKAGE}.core.cache":
            out.append(f"{module} imports {name}; of core only cache.py may")
        if part == "core" and top == "peft":
            out.append(f"{module} imports {name}; core is the method alone")
    return out


def _known_prefix(name: str) -> str:
    """The part of a dotted name that is a module: ``verl_pte.core.schedule.Schedule`` -> ``verl_pte.core.schedule``."""
    known = {module for module, _ in modules()}
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in known:
            return ".".join(parts[:end])
    return name


@pytest.mark.parametrize("module, path", [pytest.param(m, p, id=m) for m, p in modules()])
def test_module_keeps_the_rule(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "module, source, complaint",
    [
        ("verl_pte.core.new", "from verl_pte.peft import attach", "imports verl_pte.peft.attach"),
        ("verl_pte.core.new", "from ..config import PTEConfig", "imports verl_pte.config.PTEConfig"),
        ("verl_pte.core.new", "import transformers", "only cache.py"),
        ("verl_pte.engine.new", "def f():\n    import verl.utils", "without verl"),
        ("verl_pte.engine.new", "from verl_pte.learner import Replay", "imports verl_pte.learner.Replay"),
        ("verl_pte.learner.new", "from verl_pte.verl.checks import check_run", "imports verl_pte.verl.checks"),
        ("verl_pte.learner.new", "from verl_pte import RolloutEngine", "imports verl_pte.RolloutEngine"),
        ("verl_pte.peft.new", "if True:\n    from ray import get", "without ray"),
        ("verl_pte.peft.new", "from importlib import import_module\nimport_module('vllm')", "without vllm"),
        (
            "verl_pte.patches.new",
            "def f():\n    from verl_pte.verl.checks import check_run",
            "imports verl_pte.verl.checks",
        ),
        ("verl_pte.config", "from verl_pte.patches import validate_config", "imports verl_pte.patches.validate_config"),
        ("verl_pte.engine.new", "from verl_pte.vllm import engine_args", "imports verl_pte.vllm.engine_args"),
        ("verl_pte.engine.new", "def f():\n    import vllm", "without vllm"),
        ("verl_pte.vllm.new", "from verl_pte.verl.checks import check_run", "imports verl_pte.verl.checks"),
        ("verl_pte.vllm.new", "from verl_pte.cli import app", "imports verl_pte.cli.app"),
        ("verl_pte.vllm.new", "def f():\n    import ray", "without ray"),
        ("verl_pte.cli.new", "def f():\n    from vllm import LLM", "without vllm"),
        ("verl_pte.cli.new", "from verl_pte.verl.checks import check_run", "imports verl_pte.verl.checks"),
        ("verl_pte.data.new", "from verl_pte.cli import app", "imports verl_pte.cli.app"),
        ("verl_pte.data.new", "def f():\n    import verl", "without verl"),
        ("verl_pte.cli.new", "import datasets", "without datasets"),
        ("verl_pte.bench.new", "from verl_pte.cli import app", "imports verl_pte.cli.app"),
        ("verl_pte.bench.new", "def f():\n    import verl", "without verl"),
        ("verl_pte.bench.verl_baseline", "from verl_pte.verl.checks import check_run", "imports verl_pte.verl.checks"),
    ],
)
def test_checker_catches(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(source, module))


@pytest.mark.parametrize(
    "module, source",
    [
        ("verl_pte.core.cache", "from transformers.cache_utils import Cache"),
        ("verl_pte.core.new", "from .schedule import Schedule\nimport torch"),
        (
            "verl_pte.verl.new",
            "import ray\nfrom verl_pte.learner import Replay\nfrom verl_pte.patches import metric_names",
        ),
        ("verl_pte.verl.new", "from verl_pte.vllm import engine_args"),
        (
            "verl_pte.vllm.new",
            "from vllm.config import VllmConfig\nfrom verl_pte.engine.sampling import SamplingParams",
        ),
        ("verl_pte.cli.new", "import rich\nfrom verl_pte.vllm.serve import serve"),
        ("verl_pte.data.new", "from verl_pte.rewards.answer import final_answer\nimport datasets"),
    ],
)
def test_checker_admits(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_unknown_part_has_to_be_entered() -> None:
    with pytest.raises(AssertionError, match="MAY_IMPORT"):
        part_of("verl_pte.something_new.module")


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import verl_pte")
    assert not loaded & {"torch", "transformers", "peft", "numpy", "verl", "ray"}


def test_public_names_load_without_verl() -> None:
    loaded = _loaded_by("import verl_pte\nfor name in verl_pte.__all__: getattr(verl_pte, name)")
    assert "torch" in loaded
    assert not loaded & OPTIONAL


def test_command_line_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import verl_pte.cli")
    assert "typer" in loaded
    assert not loaded & (OPTIONAL | {"torch", "transformers", "peft", "numpy"})


def test_data_part_loads_what_reads_files_on_use_only() -> None:
    loaded = _loaded_by("import verl_pte.data")
    assert not loaded & (OPTIONAL | {"torch", "numpy", "pyarrow"})


def test_vllm_part_loads_vllm_on_use_only() -> None:
    """It is asked for settings and versions where vLLM is missing, or not to be touched yet."""
    names = ("plugin", "settings", "version", "weights", "options", "serve", "stream")
    loaded = _loaded_by("import verl_pte.vllm, " + ", ".join(f"verl_pte.vllm.{name}" for name in names))
    assert not loaded & OPTIONAL


def test_benchmarks_load_no_optional_package() -> None:
    modules = ("__main__", "engines", "decode", "learner_worker", "learner_steps", "flops")
    loaded = _loaded_by("import " + ", ".join(f"verl_pte.bench.{name}" for name in modules))
    assert "torch" in loaded
    assert not loaded & (OPTIONAL | {"pyarrow", "matplotlib"})


# -- one schedule ----------------------------------------------------------------------------------------

_SCHEDULE_NUMBERS = {"evict_fraction", "window", "block_size", "chunk"}
_SCALING = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)


def schedule_arithmetic(source: str) -> list[str]:
    """Products, quotients and remainders of the schedule's numbers; sums are buffer sizes, which all may compute."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, _SCALING):
            sides = (node.left, node.right)
            if any(isinstance(side, ast.List) for side in sides):
                continue  # repeats a list
            if isinstance(node.op, ast.Mod) and getattr(node.right, "id", "").isupper():
                continue  # asks whether a setting is a multiple of what kernels demand
            for side in sides:
                name = getattr(side, "attr", getattr(side, "id", ""))
                if name in _SCHEDULE_NUMBERS:
                    out.append(ast.unparse(node))
    return out


@pytest.mark.parametrize(
    "module, path",
    [pytest.param(m, p, id=m) for m, p in modules() if m != "verl_pte.core.schedule"],
)
def test_only_the_schedule_computes_evictions(module: str, path: Path) -> None:
    assert schedule_arithmetic(path.read_text()) == []


def test_schedule_arithmetic_is_recognised() -> None:
    assert schedule_arithmetic("c = math.ceil(config.evict_fraction * config.window)") != []
    assert schedule_arithmetic("first = (position - pinned) // chunk") != []
    assert schedule_arithmetic((ROOT / PACKAGE / "core" / "schedule.py").read_text()) != []
    assert schedule_arithmetic("offset = position % schedule.block_size") != []
    assert schedule_arithmetic("slots = pinned_max + window") == []
    assert schedule_arithmetic("if pte.block_size % BLOCK_MULTIPLE: raise ValueError") == []
