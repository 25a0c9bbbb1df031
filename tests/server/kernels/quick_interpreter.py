"""A plugin for pytest: Triton's interpreter without the work that has no effect, which is half of what it does and more.

It is for the interpreter of Triton 3.6 and says where that differs. It knows no kernel and no test.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import interpreter  # type: ignore[import-untyped]  # as above


def put_the_language_in_place_once() -> None:
    """A launch does it once for each set of modules, and not anew at every call of a function within a kernel."""
    done: set[frozenset[str]] = set()
    launch = interpreter.GridExecutor.__call__

    @functools.cache
    def modules_of(function: Any) -> frozenset[str]:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def launch_anew(executor: Any, *arguments: Any, **options: Any) -> None:
        done.clear()  # the launch before has put back what was there
        launch(executor, *arguments, **options)

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        modules = modules_of(function.fn)
        if modules not in done:
            interpreter._patch_lang(function.fn)
            done.add(modules)
        return function.rewrite()(*arguments, **options)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def leave_out_sums_that_nobody_looks_at() -> None:
    """Each sum of integers is made again in 64 bits, for an assertion that is left out itself unless one debugs."""
    options = interpreter.interpreter_builder.options
    assert options.sanitize_overflow
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def keep_dtypes() -> None:
    """NumPy's dtype for one of Triton's is looked up, and not in a table that is made for each tensor.

    Triton's cannot be hashed, but their names say all of them.
    """
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def find_once(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = find_once


put_the_language_in_place_once()
leave_out_sums_that_nobody_looks_at()
keep_dtypes()
