"""The library's source as data: modules, imports, code lines, long definitions, private names of torch.

python tests/support/source_tree.py     code lines by package: without blanks, comments and docstrings
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LAYOUT_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
# What torch's tensors, modules, storages and operators have for themselves.
_PRIVATE_ATTRIBUTES = {"_version", "_indices", "_values", "_schema", "_buffers", "_modules", "_parameters", "_ops"}
Module = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, Path]:
    """The files of the library by dotted name; a package's is its ``__init__.py``."""
    found = {}
    for path in sorted((ROOT / "dtrp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _docstring(node: ast.AST) -> ast.Expr | None:
    if isinstance(node, Module) and ast.get_docstring(node, clean=False) is not None:
        assert isinstance(node.body[0], ast.Expr)
        return node.body[0]
    return None


def code_lines(text: str) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = _docstring(node)
        if docstring is not None:
            prose.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - prose)


def long_definitions(path: Path, most: int) -> list[str]:
    """Functions of more than ``most`` lines, signature and decorators counted, the docstring not."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or 0) - start + 1
            docstring = _docstring(node)
            if docstring is not None:
                length -= (docstring.end_lineno or 0) - docstring.lineno + 1
            if length > most:
                found.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    return found


def imports() -> dict[str, set[str]]:
    """Which modules of the library each imports, also within functions; imports for type checkers alone do not count."""
    files = modules()
    return {name: set(_imports_of(name, path, files)) - {name} for name, path in files.items()}


def _imports_of(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    tree = parsed(path)
    unchecked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in unchecked:
            continue
        base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        base = base[: len(base) - (node.level - 1)] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module.split(".")[0] == "dtrp":
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in files else module


def package_of(module: str) -> str:
    """The package of a module; a module of the root stands for itself."""
    return module.split(".")[1] if "." in module else "dtrp"


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def between_packages(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports from one package, or module of the root, to another."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        found[package_of(module)] |= {package_of(target) for target in targets} - {package_of(module)}
    return dict(found)


def reachable(arrows: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """Everything further along the arrows."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in arrows.get(waiting.pop(), ()):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def private_names_of_torch(path: Path) -> list[str]:
    """Uses of names that torch keeps to itself, as ``line: name``."""
    found = []
    for node in ast.walk(parsed(path)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names if alias.name.startswith("torch") for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith("torch.") or (node.attr in _PRIVATE_ATTRIBUTES and not text.startswith("self._")):
                names = [node.attr]
        found += [f"{node.lineno}: {name}" for name in names if name.startswith("_") and not name.endswith("__")]  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    totals: dict[str, int] = defaultdict(int)
    for module, path in modules().items():
        totals[package_of(module) if path.parent.name != "dtrp" else "root"] += code_lines(path.read_text())
    for package, lines in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{lines:6,}  {package}")
    print(f"{sum(totals.values()):6,}  in all")
