"""Repository layout: imports run downward, no private names of other modules, a method's name is written once."""

import ast
import re
from pathlib import Path

import pytest

from prefopt import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prefopt"
# The layers of the package, bottom up: a module imports from its own layer and from lower ones, never from higher ones.
LAYERS = [
    ["__init__", "types", "redaction", "errors", "figures", "storage", "placeholders"],
    ["kernels"],
    ["thoughts", "method", "rounds_method", "batch_losses", "dpo_variants", "methods", "ranking", "registry", "losses"],
    ["settings"],
    ["data"],
    ["training"],
    ["testbed", "generation", "judges"],
    ["evaluate"],
    ["rounds", "inference"],
    ["planner", "sweeps"],
    ["exits", "run"],
    ["cli", "__main__"],
]
LAYER = {part: height for height, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path):
    """Modules of the package that a file imports anywhere, also inside functions; `TYPE_CHECKING` ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("prefopt"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prefopt"):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module


MODULES = {name_of(path) for path in FILES}


def test_every_part_of_the_package_has_a_layer():
    parts = {part_of(name_of(path)) for path in FILES}
    assert parts == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downward(path):
    mine = LAYER[part_of(name_of(path))]
    upward = [target for target in imports_of(path) if LAYER[part_of(target)] > mine]
    assert not upward, f"{path.name} imports from a higher layer"


def test_no_import_circle():
    graph = {name_of(path): set(imports_of(path)) - {name_of(path), "prefopt"} for path in FILES}
    done, under_way = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in under_way, f"import circle: {' -> '.join([*under_way, module])}"
        under_way.append(module)
        for target in graph.get(module, ()):
            visit(target)
        under_way.pop()
        done.add(module)

    for module in graph:
        visit(module)


OF_TORCH = {"_parameters", "_buffers"}  # private attributes of nn.Module, which classes of ours have too


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_members(tree):
    """Names of the private methods and attributes that the classes of a module define."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(cls):
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr
        yield from (node.target.id for node in cls.body if isinstance(node, ast.AnnAssign))


PRIVATE = {name_of(path): set(filter(is_private, private_members(ast.parse(path.read_text())))) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_reaches_into_the_private_names_of_another(path):
    tree, mine = ast.parse(path.read_text()), PRIVATE[name_of(path)]
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("prefopt")]
    names = [alias for node in imports for alias in node.names]
    found = {f"import {alias.name}" for alias in names if is_private(alias.name)}
    imported = {alias.asname or alias.name for alias in names}
    others = set().union(*PRIVATE.values()) - mine - OF_TORCH
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner in imported or (owner not in ("self", "cls") and node.attr in others):
                found.add(ast.unparse(node))
    assert not found, f"private names of other modules: {sorted(found)}"


def test_no_module_is_longer_than_500_lines():
    long = {name_of(path) for path in FILES if len(path.read_text().splitlines()) > 500}
    assert not long


def test_no_class_has_more_than_25_methods_and_no_two_public_classes_have_one_name():
    classes = [node for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    large = {node.name for node in classes if sum(isinstance(part, ast.FunctionDef) for part in node.body) > 25}
    assert not large
    public = [node.name for node in classes if not is_private(node.name)]
    assert {name for name in public if public.count(name) > 1} == set()


def test_methods_need_torch_alone():
    heavy = {"transformers", "accelerate", "datasets", "peft", "tyro", "yaml"}
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.partition(".")[0] for name in names}, path.name


def test_a_method_name_is_no_literal_outside_its_file():
    names = set(registry.names()) | set(registry.ambiguous_names())
    names -= {path.stem for path in (PACKAGE / "judges").glob("*.py")}  # a kind of judge, which a method may train
    for path in FILES:
        found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)} & (
            names - {path.stem, *(short for short, claims in registry.ambiguous_names().items() if path.stem in claims)}
        )
        assert not found, f"{path.relative_to(ROOT)} names a method: {found}"


@pytest.mark.parametrize("kinds", [registry.JUDGES, registry.ENGINES], ids=lambda kinds: kinds.folder)
def test_no_code_asks_for_a_judge_or_an_engine_by_its_name(kinds):
    """No comparison with `.kind` or `.engine`, and no `kind=` or `engine=`, has one of the names."""
    field = kinds.key.partition(".")[2]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(isinstance(side, ast.Attribute) and side.attr == field for side in sides):
                    found = [c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)]
            elif isinstance(node, ast.keyword) and node.arg == field and isinstance(node.value, ast.Constant):
                found = [node.value.value]
            assert not {*found} & {*kinds.names()}, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("name", registry.names())
def test_a_method_has_a_page_a_config_and_tests(name):
    """A method is one file, and with it a page, a config, tests by hand; golden numbers where authors have code."""
    missing = [
        wanted
        for wanted in (f"docs/methods/{name}.md", f"configs/{name}.yaml", f"tests/methods/test_{name}.py")
        if not (ROOT / wanted).is_file()
    ]
    golden = list((ROOT / "tests/golden").glob(f"*{name}*.json"))
    page = ROOT / "docs/methods" / f"{name}.md"
    if not golden and not (page.is_file() and "no golden numbers" in page.read_text()):
        missing.append(f"tests/golden/*{name}*.json (or the words 'no golden numbers' and why on its page)")
    assert not missing, f"method '{name}' lacks {', '.join(missing)}"


def test_the_public_pages_name_no_path_outside_the_repository():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for page in [*pages, *FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = page.read_text()
        assert "../shared" not in text, page.name


def test_only_storage_locks_hashes_and_renames_files():
    own = re.compile(r"\b(?:hashlib|fcntl|os\.replace|os\.rename|mkdtemp)\b")
    for path in FILES:
        if part_of(name_of(path)) != "storage":
            found = [line for line in path.read_text().splitlines() if own.search(line.partition("#")[0])]
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_every_config_parses_with_its_method():
    from prefopt.settings import parse

    folder, model = ROOT / "configs", ["--model.path", "m", "--data.train", "pairs.jsonl"]
    for path in [*folder.glob("*.yaml"), *(folder / "papers").glob("*.yaml")]:
        if path.name == "testbed.yaml":
            for name in registry.names():
                assert parse(["--method", name, "--config", str(path)]).testbed.pairs == 40_000
        else:  # a method's papers may have several, such as sppo.yaml and sppo_code.yaml
            name = parse(["--config", str(path), *model]).method_name
            assert path.stem == name or (path.parent.name == "papers" and path.stem.startswith(f"{name}_"))


def test_every_recipe_is_rounds_of_the_method_that_it_names_and_says_where_its_numbers_come_from():
    from prefopt.settings import parse

    for path in (ROOT / "configs" / "recipes").glob("*.yaml"):
        config = parse(["--config", str(path), "--model.path", "m", "--data.train", "pairs.jsonl"])
        assert config.rounds.count >= 1, path.name
        assert path.stem not in registry.names(), f"{path.name}: a recipe is no method"
        comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert len(comment) >= 2, path.name
        assert max(map(len, path.read_text().splitlines())) <= 120, path.name
