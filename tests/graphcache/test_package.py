"""What the package as a whole promises."""

from __future__ import annotations

import subprocess
import sys

import graphcache


def test_it_imports_nothing_of_ours_and_no_torch() -> None:
    """Importing the library loads neither torch nor anything else of this project, nor any third party."""
    code = (
        "import sys; before = set(sys.modules); import graphcache; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "['graphcache']"


def test_all_names_are_there() -> None:
    """Every public name exists and has a docstring."""
    for name in graphcache.__all__:
        thing = getattr(graphcache, name)
        if isinstance(thing, type):
            assert thing.__doc__, name
