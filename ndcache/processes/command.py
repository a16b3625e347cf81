"""The command that starts a helper process: interpreter, arguments, environment and working directory.

A helper must import the same ndcache as its parent, and nothing from the user's working directory. Its arguments and
its environment, which other users can read or which crash reports contain, hold no secret: the parent's environment
goes through the pipe, and only what the interpreter itself needs is passed on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

__all__ = [
    "COMMAND",
    "WORKING_DIRECTORY",
    "absolute_paths",
    "helper_arguments",
    "helper_environ",
    "package_root",
    "why_no_interpreter",
]

#: The first argument of ``python -m ndcache`` that makes it a helper process.
COMMAND = "_helper"
#: Where helpers run. Python before 3.11 has no -P, and imports from here first.
WORKING_DIRECTORY = os.path.abspath(os.sep)
#: File names of Python interpreters: python, python3.13t, python3-dbg, pypy3.10, pythonw.exe.
_INTERPRETER = re.compile(r"(?:python|pypy|graalpy)w?[\d.]*[dmtu]*(?:-dbg|-debug|-intel64)?(?:\.exe)?", re.IGNORECASE)
#: Variables that the interpreter, the C library and the dynamic linker read before the request arrives.
_NEEDED = re.compile(r"PYTHON\w*|LD_\w+|DYLD_\w+|LC_\w+|LANG|HOME|SYSTEMROOT|MALLOC_\w+|GLIBC_TUNABLES|\w+SAN_OPTIONS")
#: Variables that would make a helper stop for input, or import from folders that only the parent may use.
_UNWANTED = ("PYTHONPATH", "PYTHONINSPECT", "PYTHONSTARTUP")
#: Variables whose values are paths, which may be relative to the parent's working directory.
_PATHS = (
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "NETRC", "HOME"),
    *("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "TMPDIR"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"),
    *("GOOGLE_SERVICE_ACCOUNT_PATH", "AZURE_FEDERATED_TOKEN_FILE"),
)
_SITE_DIRECTORIES = ("site-packages", "dist-packages")


def why_no_interpreter() -> str | None:
    """Return why this process cannot start another Python, or None if it can."""
    path = sys.executable
    if sys.platform == "win32":
        return "helper processes need pipes and signals that Windows does not have"
    if getattr(sys, "frozen", False):
        return "this program is frozen, and has no Python interpreter"
    if not path or not os.path.isabs(path):
        return "sys.executable does not name the Python interpreter"
    if not any(_INTERPRETER.fullmatch(os.path.basename(name)) for name in (path, os.path.realpath(path))):
        return f"sys.executable is no Python interpreter: {path}"
    if not os.access(path, os.X_OK):
        return f"sys.executable cannot be executed: {path}"
    return None


def helper_arguments() -> list[str]:
    """Return the command line of a helper of this process."""
    import subprocess  # not for loads in one process

    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    if _passes_root():
        # The root goes through PYTHONPATH, which -I and -E ignore. `helper_environ` drops what else they ignore.
        flags = ["-s" if flag == "-I" else flag for flag in flags if flag != "-E"]
    if sys.version_info >= (3, 11) and "-P" not in flags:
        flags.append("-P")
    return [sys.executable, *flags, "-m", "ndcache", COMMAND, str(os.getpid())]


def helper_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with which a helper starts; the rest of `environ` reaches it with its request."""
    needed = {name: value for name, value in environ.items() if _NEEDED.fullmatch(name) and name not in _UNWANTED}
    roots = [package_root()] if _passes_root() else []
    if sys.flags.ignore_environment:
        needed = {name: value for name, value in needed.items() if not name.startswith("PYTHON")}
    else:
        roots += _safe_entries(environ.get("PYTHONPATH", ""))
    return {
        **needed,
        "PYTHONSAFEPATH": "1",
        **({"PYTHONPATH": os.pathsep.join(dict.fromkeys(roots))} if roots else {}),
    }


def absolute_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with absolute paths, for a process with another working directory."""
    relative = {
        name: _absolute(value)
        for name in _PATHS
        if (value := environ.get(name)) and not value.startswith(("~", "$")) and not os.path.isabs(value)
    }
    return {**environ, **relative}


def package_root() -> str:
    """Return the directory, or the archive, from which ndcache was imported. Links are not followed."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _passes_root() -> bool:
    """Return whether a new Python would not find ndcache, or would find it behind something else, by itself."""
    root, library = package_root(), os.path.dirname(os.path.abspath(os.__file__))
    path = [_absolute(entry) for entry in sys.path]
    if sys.flags.no_site:
        return True
    if root not in path:  # found by the import hook of an installation, or by a relative entry
        return not any(getattr(finder, "__module__", "").startswith("__editable___ndcache") for finder in sys.meta_path)
    if library in path and path.index(root) < path.index(library):
        return True  # from PYTHONPATH, the script's directory, or sys.path.insert
    return os.path.basename(root) not in _SITE_DIRECTORIES and root not in _entries_of_installations()


def _entries_of_installations() -> Iterator[str]:
    """Yield the directories that ``.pth`` files, such as those of ``pip install -e``, add to the module path."""
    for directory in sys.path:
        if os.path.basename(directory) in _SITE_DIRECTORIES and os.path.isdir(directory):
            for name in os.listdir(directory):
                if name.endswith(".pth"):
                    with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
                        yield from (_absolute(os.path.join(directory, line.strip())) for line in file)


def _safe_entries(path: str) -> list[str]:
    """Return the entries of PYTHONPATH that are absolute, and not the working directory."""
    here = _absolute("")
    working_directory = os.path.realpath(here) if here else ""
    entries = [entry for entry in path.split(os.pathsep) if os.path.isabs(entry)]
    return [entry for entry in entries if os.path.realpath(entry) != working_directory]


def _absolute(path: str) -> str:
    """Return an absolute path; `path` itself if it is relative to a working directory that was removed."""
    with suppress(FileNotFoundError):
        return os.path.abspath(path)
    return path
