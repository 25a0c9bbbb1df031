"""What the shipped Python must not contain: ways for data to become code, and for a request to become a shell's words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server/hotgraph_server", "graphcache", "clients/python/hotgraph_client")

# They run what they read.
MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
CALLS = frozenset(
    {
        "torch.load",  # a pickle
        "torch.save",  # makes one
        "torch.jit.load",
        "torch.package.PackageImporter",
        "torch.hub.load",
        "numpy.load",  # a pickle on demand
        "np.load",
        "yaml.load",
        "yaml.unsafe_load",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "multiprocessing.connection.Listener",  # pickles on a socket
        "multiprocessing.connection.Client",
        "json_format.Parse",  # messages come in binary: another way in has other bounds
        "json_format.ParseDict",
        "types.FunctionType",
        "types.CodeType",
    }
)
LOADERS = frozenset(
    {"from_pretrained"}
)  # of transformers: they fetch, and run what a folder brings, unless told not to
SAFE_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of all that must not be there. Names are taken as they are written: no code here hides its own."""
    tree = ast.parse(source)
    names = {  # what a name was imported as: `from torch import load as read` is torch.load
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                found = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            case _:
                found = []
        for name in found:
            if name.split(".")[0] in MODULES:
                yield node.lineno, f"imports {name}"  # type: ignore[attr-defined]  # every import has a line
        if isinstance(node, ast.Call):
            for reason in _wrong_call(node, names):
                yield node.lineno, reason
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in SAFE_OPTIONS:
                    yield from _wrong_option(node.lineno, str(key.value), value)


def _wrong_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    called = ast.unparse(node.func)
    first, dot, rest = called.partition(".")
    full = names.get(first, first) + dot + rest
    if isinstance(node.func, ast.Name) and called in BUILTINS:
        yield f"calls {called}"
    if full in CALLS or any(full.endswith(f".{name}") for name in CALLS):
        yield f"calls {full}"
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    if "shell" in options and not _is(options["shell"], value=False):
        yield f"{called} with shell="
    for name in SAFE_OPTIONS:
        if name in options:
            yield from (reason for _, reason in _wrong_option(node.lineno, name, options[name]))
    if called.rpartition(".")[2] in LOADERS and None not in options:
        yield from (f"{called} without {name}" for name in SAFE_OPTIONS if name not in options)


def _wrong_option(line: int, name: str, value: ast.expr) -> Iterator[tuple[int, str]]:
    if not _is(value, value=SAFE_OPTIONS[name]):
        yield line, f"{name} is {ast.unparse(value)}"


def _is(node: ast.expr, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_nothing_forbidden_is_shipped() -> None:
    """No module of daemon, library or client turns data into code, or words into a shell's."""
    files = python_files()
    assert len(files) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reason}" for path in files for line, reason in forbidden(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill",
        "from marshal import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "from torch import jit\njit.load('x')",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=maybe)",
        "from google.protobuf import json_format\njson_format.Parse(text, message)",
        "from google.protobuf.json_format import ParseDict\nParseDict(data, message)",
        "AutoModel.from_pretrained('x', trust_remote_code=True, local_files_only=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
        "AutoModel.from_pretrained('x')",
        "options = {'trust_remote_code': settings.trust}",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    """Each way in is noticed where it is written."""
    assert list(forbidden(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "AutoModel.from_pretrained('x', trust_remote_code=False, local_files_only=True)",
        "AutoModel.from_pretrained(**{'trust_remote_code': False, 'local_files_only': True})",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import json\njson.loads('1')",
    ],
)
def test_what_is_allowed_is_not(source: str) -> None:
    """Words that only look alike are no finding."""
    assert list(forbidden(source)) == []
