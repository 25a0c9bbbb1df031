"""No code of ours runs what a file or a caller sends: no pickle, no eval, no shell, no remote code. It reads syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("server/hotgraph_server", "clients/python/hotgraph_client", "graphcache")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve", "pty"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}  # only a literal False may follow


def forbidden(source: str) -> Iterator[str]:
    """What a source must not hold, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        yield from (f"{node.lineno}: {what}" for what in _forbidden_in(node) if isinstance(node, ast.stmt | ast.expr))


def _forbidden_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module:
        if node.module.split(".")[0] in MODULES:
            yield node.module
        yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in ATTRIBUTES)
    elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in ATTRIBUTES:
        yield name
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        yield from (f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords if _is_forbidden_keyword(word))
    elif isinstance(node, ast.Dict):  # keyword arguments that are passed as **{...}
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value in KEYWORDS and not _is_false(value):
                yield f"{key.value}: {ast.unparse(value)}"


def _is_forbidden_keyword(word: ast.keyword) -> bool:
    return word.arg in KEYWORDS and not _is_false(word.value)


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_code(path: Path) -> None:
    """A file of the server, the client or the library holds nothing of the kind."""
    assert list(forbidden(path.read_text(encoding="utf-8"))) == []


def test_files_are_found() -> None:
    """The check looks at each of the three packages."""
    for folder in FOLDERS:
        assert any(path.is_relative_to(ROOT / folder) for path in FILES), folder


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from dill import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "load = torch.load",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "model(trust_remote_code=True)",
        "model(**{'trust_remote_code': True})",
        "np.load(path)",
        "np.frombuffer(b, allow_pickle=maybe)",
    ],
)
def test_the_check_finds(source: str) -> None:
    """Each kind of forbidden code is found."""
    assert list(forbidden(source))


@pytest.mark.parametrize(
    "source",
    [
        "re.compile('x')",
        "model.eval()",
        "subprocess.run(['ls'], shell=False)",
        "model(trust_remote_code=False)",
        "safetensors.torch.load_file(path)",
        "json.load(file)",
        "'a word about pickle and eval()'",
    ],
)
def test_the_check_leaves_be(source: str) -> None:
    """What only looks like it is let through."""
    assert list(forbidden(source)) == []
