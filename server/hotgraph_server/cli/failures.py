"""What users see when something fails: one line on standard error and an exit status. It knows both trees of our errors."""

from __future__ import annotations

import enum
import os
import sys
import tempfile
import traceback

from hotgraph_server.cli.output import note, safe


class ExitStatus(enum.IntEnum):
    """Exit statuses; the larger ones are those of sysexits.h, which systemd and mail tools know, too."""

    OK = 0
    FAILED = 1  # the request failed
    USAGE = 2  # the command line is wrong
    UNAVAILABLE = 69  # no daemon there, address in use, or something is not installed
    INTERNAL = 70  # our mistake
    TRY_LATER = 75  # the same may succeed later
    SETTINGS = 78  # a setting or the model is wrong
    INTERRUPTED = 130  # Ctrl-C


class CommandError(Exception):
    """A command cannot go on. The message is for people, one line."""

    def __init__(self, message: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(message)
        self.status = status


def report(error: BaseException) -> ExitStatus:
    """Prints what users need to know of `error` on standard error, and says which status to exit with."""
    status, message = describe(error)
    for line in safe(message).splitlines() or [""]:
        note(f"hotgraph: {line}")
    return status


def describe(error: BaseException) -> tuple[ExitStatus, str]:
    """Exit status and message of an error. Writes the traceback of one that nobody expected to a file, and names that."""
    if isinstance(error, CommandError):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus.INTERRUPTED, "interrupted"
    known = _describe_client_error(error) or _describe_server_error(error)
    if known is not None:
        return known
    return ExitStatus.INTERNAL, f"internal error: {type(error).__name__}: {error}; details are in {_save(error)}"


def _describe_client_error(error: BaseException) -> tuple[ExitStatus, str] | None:
    """None when it is none of the client's errors. The client is loaded already when it is one."""
    if "hotgraph_client" not in sys.modules:
        return None
    from hotgraph_client import errors

    if not isinstance(error, errors.HotgraphError):
        return None
    reason = f" [{error.reason}]" if error.reason else ""
    message = str(error)
    for violation in error.violations:  # each is told once, whether or not the message holds it already
        if violation.field not in message:
            message += f"; {violation.field}: {violation.description}"
    if error.retry_after_seconds is not None:
        message += f" (try again in {error.retry_after_seconds:.3g} s)"
    if isinstance(error, errors.StreamLostError):
        return ExitStatus.UNAVAILABLE, f"the daemon was lost: {message}{reason}"
    if isinstance(error, errors.UnavailableError):
        hint = "" if reason else "; hotgraph serve starts one, --target says where it is"
        return ExitStatus.UNAVAILABLE, f"no daemon answers: {message}{reason}{hint}"
    is_retryable = isinstance(error, errors.RetryableError)
    return (ExitStatus.TRY_LATER if is_retryable else ExitStatus.FAILED), f"{message}{reason}"


def _describe_server_error(error: BaseException) -> tuple[ExitStatus, str] | None:
    """None when it is none of the server's errors."""
    from hotgraph_server import errors

    if not isinstance(error, errors.HotgraphError):
        return None
    if isinstance(error, errors.AddressInUseError):
        return ExitStatus.UNAVAILABLE, error.message
    if isinstance(error, errors.SettingsError | errors.ModelLoadError):
        return ExitStatus.SETTINGS, error.message
    is_retryable = isinstance(error, errors.RetryableError)
    return (ExitStatus.TRY_LATER if is_retryable else ExitStatus.FAILED), f"{error.message} [{error.reason}]"


def _save(error: BaseException) -> str:
    handle, path = tempfile.mkstemp(prefix="hotgraph-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(traceback.format_exception(error))
    return path
