"""What a helper process imports, what others can see of it, and in which programs it can start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import trustme

import ndcache
from ndcache.processes.command import absolute_paths, helper_arguments, helper_environ

from ..helpers import models
from ..helpers.processes import helpers_of, is_alive
from ..helpers.servers import FileServer, Request
from ..helpers.transport import with_name
from .children import Serve, wait_until

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

#: Of cases that take long, the others are enough on the other Pythons.
ONCE = pytest.mark.once
ROOT = Path(ndcache.__file__).parents[1]
SHARDS = 8
#: Loads a model with a helper, which must take part, and prints what it got.
LOAD = """
import sys
import ndcache

weights = ndcache.load(sys.argv[-1], processes=2, max_workers=1)
print(len(weights), weights.stats.network_bytes, weights.stats.requests, file=sys.stdout)
"""
EXPECTED = f"{SHARDS} {SHARDS << 16} {SHARDS + 1}\n"
HOSTILE = (
    "ndcache",
    "requests",
    "numpy",
    "json",
    "select",
    "threading",
    "queue",
    "os",
    "signal",
    "encodings",
    "sitecustomize",
)


@pytest.fixture
def server(model: Path, serve: Serve) -> FileServer:
    """Return a server that sends no shard before two processes ask for one."""
    models.simple_model(model, shards=SHARDS)
    server: FileServer = serve(model)
    server.gate.clear()
    return server


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder of modules with names that a helper imports, each of which leaves a file when it is imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write({name!r})")
    return folder


def run(
    server: FileServer,
    *arguments: str,
    cwd: Path | None = None,
    script: str | None = None,
    environ: dict[str, str] | None = None,
    look: Callable[[int, list[int]], None] = lambda parent, helpers: None,
) -> str:
    """Run Python with these arguments, the model's URL last; return what it prints. Its helper must take part."""
    everything = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, *arguments, server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**everything, **(environ or {"PYTHONPATH": str(ROOT)})},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(script or "")
        process.stdin.close()
    process.stdin = None
    wait_until(lambda: server.peak_bodies >= 2 or process.poll() is not None)
    helpers = helpers_of(process.pid)
    look(process.pid, helpers)
    server.gate.set()
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert len(helpers) == 1
    wait_until(lambda: not any(map(is_alive, helpers)))
    return printed


@pytest.mark.parametrize("how", ["-c", "file", "standard input", "exec"])
def test_scripts_need_no_guard(server: FileServer, tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOAD)
    if how == "-c":
        assert run(server, "-c", LOAD) == EXPECTED
    elif how == "file":
        assert run(server, str(script)) == EXPECTED
    elif how == "standard input":
        assert run(server, "-", script=LOAD) == EXPECTED
    else:  # as in a notebook, whose __main__ has no file
        assert run(server, "-c", f"exec(compile({LOAD!r}, '<cell>', 'exec'), {{'__name__': '__main__'}})") == EXPECTED


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(str(ROOT), marks=ONCE),
        os.pathsep.join([str(ROOT), ""]),
        pytest.param(os.pathsep.join([str(ROOT), "."]), marks=ONCE),
        os.pathsep.join(["", str(ROOT)]),
    ],
    ids=["root", "root and empty", "root and dot", "empty and root"],
)
def test_row_70_nothing_is_imported_from_the_working_directory(
    server: FileServer, hostile: Path, tmp_path: Path, path: str
) -> None:
    """Also if the parent has relative entries in PYTHONPATH, which it resolved before it changed its directory."""
    script = f"import os, sys; sys.path.remove('')\nos.chdir({str(hostile)!r})\n{LOAD}"
    assert run(server, "-c", script, cwd=tmp_path, environ={"PYTHONPATH": path}) == EXPECTED
    assert not (hostile / "imported").exists()


def test_row_70_nothing_is_imported_from_a_working_directory_in_pythonpath(server: FileServer, hostile: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(hostile)])
    environ = helper_environ({"PYTHONPATH": path})
    assert str(hostile) in environ["PYTHONPATH"].split(os.pathsep)
    before = os.getcwd()
    os.chdir(hostile)
    try:
        assert str(hostile) not in helper_environ({"PYTHONPATH": path}).get("PYTHONPATH", "").split(os.pathsep)
    finally:
        os.chdir(before)


@pytest.mark.once
def test_row_70_a_script_whose_folder_has_hostile_names(server: FileServer, hostile: Path) -> None:
    """Python puts the script's folder before everything else, for the parent; helpers do not see it."""
    script = hostile / "script.py"
    script.write_text(f"import sys\nsys.path.remove({str(hostile)!r})\n{LOAD}")
    assert run(server, str(script), cwd=hostile) == EXPECTED
    assert not (hostile / "imported").exists()


@pytest.mark.once
def test_the_command_line_has_the_option(server: FileServer) -> None:
    arguments = ("-m", "ndcache", "fetch", "--quiet", "--processes", "2", "--max-workers", "1")
    directory = Path(run(server, *arguments).rstrip("\n"))
    assert len(list(directory.glob("*.bin"))) == SHARDS


@pytest.mark.once
@pytest.mark.parametrize(
    "how", ["insert", "relative", *(pytest.param(how, marks=ONCE) for how in ("append", "script's folder"))]
)
def test_helpers_import_the_ndcache_of_their_parent(server: FileServer, tmp_path: Path, how: str) -> None:
    """It may lie beside a script, or in a folder that the script puts into `sys.path`."""
    folder = tmp_path / "lib"
    folder.mkdir()
    shutil.copytree(ROOT / "ndcache", folder / "ndcache", ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / "script.py" if how == "script's folder" else tmp_path / "script.py"
    change = {
        "insert": f"sys.path.insert(0, {str(folder)!r})",
        "append": f"sys.path.append({str(folder)!r})",
        "script's folder": "",
        "relative": "sys.path.insert(0, 'lib')",
    }[how]
    script.write_text(f"import sys\n{change}\n{LOAD}")
    assert run(server, str(script), cwd=tmp_path, environ={"LANG": "C.UTF-8"}) == EXPECTED


@pytest.mark.parametrize(
    "given", ["-I", "-W error", "-X utf8", *(pytest.param(flag, marks=ONCE) for flag in ("-E", "-s", "-O", "-B"))]
)
def test_flags_of_the_interpreter_are_passed_on(server: FileServer, given: str) -> None:
    flags = given.split()
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOAD}"
    seen: list[list[bytes]] = []

    def look(parent: int, helpers: list[int]) -> None:
        seen.extend(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in helpers)

    assert run(server, *flags, "-c", script, look=look) == EXPECTED
    passed = [flag.encode() for flag in ({"-I": ["-s"], "-E": [], "-W": ["-Werror"]}.get(flags[0], flags))]
    assert set(passed) <= set(seen[0])
    assert seen[0][seen[0].index(b"-m") :][:3] == [b"-m", b"ndcache", b"_helper"]


SECRETS = ("hf_secret_token", "secret-password", "secret-of-the-proxy", "secret-in-the-query")


@pytest.mark.once
def test_row_70_secrets_are_in_no_argument_environment_or_file(
    server: FileServer, tmp_path: Path, cache_dir: Path
) -> None:
    """A token in the environment, a password in a URL, and a signature in another do not show, and reach the server."""
    port = server.url.rpartition(":")[2].strip("/")
    url = f"http://user:secret-password@127.0.0.1:{port}/?signature=secret-in-the-query"
    environ = {
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": "hf_secret_token",
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "FTP_PROXY": "http://user:secret-of-the-proxy@127.0.0.1:1",
        "NO_PROXY": "127.0.0.1",
    }
    checked: list[int] = []

    def look(parent: int, helpers: list[int]) -> None:
        for pid in helpers:
            for name in ("cmdline", "environ"):
                text = Path(f"/proc/{pid}/{name}").read_bytes().decode()
                assert not [secret for secret in SECRETS if secret in text], name
            checked.append(pid)

    script = LOAD.replace("sys.argv[-1]", repr(url))
    assert run(server, "-c", script, environ=environ, look=look) == EXPECTED
    assert len(checked) == 1
    assert {request.headers["authorization"][:6] for request in server.requests} == {"Basic "}
    assert all("signature=secret-in-the-query" in request.target for request in server.requests)
    for path in tmp_path.rglob("*"):
        if path.is_file() and cache_dir in path.parents:
            assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path


COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(FileServer):
    """Names a commit in each response."""

    def _answer_file(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        end_headers = handler.end_headers

        def end_with_commit() -> None:
            handler.send_header("X-Repo-Commit", COMMIT)
            end_headers()

        handler.end_headers = end_with_commit  # type: ignore[method-assign]
        try:
            super()._answer_file(handler, request)
        finally:
            handler.end_headers = end_headers  # type: ignore[method-assign]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    for revision in ("main", COMMIT):
        models.simple_model(tmp_path / "hub" / "o" / "m" / "resolve" / revision, shards=SHARDS)
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.close()


def test_the_token_of_hugging_face_and_the_commit_reach_the_helpers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is the one that was set when the loader was made, and the commit that of the manifest."""
    server = hub
    monkeypatch.setenv("HF_ENDPOINT", server.url.rstrip("/"))
    monkeypatch.setenv("HF_TOKEN", "hf_first")
    with ndcache.Loader(processes=2, max_workers=1) as loader:
        monkeypatch.setenv("HF_TOKEN", "hf_second")
        server.gate.clear()
        tensors = loader.stream("hf://o/m")
        with ThreadPoolExecutor(1) as executor:
            loading = executor.submit(dict, tensors)
            wait_until(lambda: server.peak_bodies >= 2 or loading.done())
            server.gate.set()
            assert len(loading.result()) == SHARDS
    assert server.peak_bodies == 2
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer hf_first"}
    assert {request.path.split("/")[4] for request in server.shard_requests()} == {COMMIT}


@pytest.mark.once
def test_a_relative_netrc_serves_the_helpers(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    environ = {"PYTHONPATH": str(ROOT), "NETRC": "netrc"}
    assert run(server, "-c", LOAD, cwd=tmp_path, environ=environ) == EXPECTED
    assert {request.headers["authorization"] for request in server.requests} == {"Basic dXNlcjpzZWNyZXQ="}


@pytest.mark.once
def test_a_private_authority_serves_the_helpers(server: FileServer, tmp_path: Path) -> None:
    """Its file is given by a relative path."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    plain = server._server.socket
    server._server.socket = with_name(authority, "127.0.0.1").wrap_socket(plain, server_side=True)
    server.url = server.url.replace("http:", "https:")
    environ = {"PYTHONPATH": str(ROOT), "REQUESTS_CA_BUNDLE": "authority.pem"}
    assert run(server, "-c", LOAD, cwd=tmp_path, environ=environ) == EXPECTED


@pytest.mark.once
def test_a_working_directory_that_was_removed(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"import os, ndcache.loader; os.rmdir({str(tmp_path / 'gone')!r})\n{LOAD}"
    assert run(server, "-c", script, cwd=tmp_path / "gone") == EXPECTED


def test_a_daemon_without_standard_streams(server: FileServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"import os\nos.closerange(0, 3)\n{LOAD.replace('sys.stdout', f'open({str(out)!r}, chr(119))')}"
    assert run(server, "-c", script) == ""
    assert out.read_text() == EXPECTED


@pytest.mark.once
def test_helpers_run_elsewhere_with_few_open_files(server: FileServer, tmp_path: Path) -> None:
    """They inherit no descriptor of the parent, even an inheritable one."""
    found: list[tuple[str, list[str]]] = []

    def look(parent: int, helpers: list[int]) -> None:
        for pid in helpers:
            names = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            found.append((os.readlink(f"/proc/{pid}/cwd"), names))

    script = f"import os; os.set_inheritable(os.open({__file__!r}, os.O_RDONLY), True)\n{LOAD}"
    assert run(server, "-c", script, cwd=tmp_path, look=look) == EXPECTED
    ((cwd, files),) = found
    assert cwd == "/"
    assert __file__ not in files


@pytest.mark.once
def test_what_a_helper_prints_does_not_reach_the_terminal(server: FileServer, tmp_path: Path) -> None:
    """Here, each Python process prints when it starts; `run` checks that standard error is empty."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '_helper' in sys.orig_argv:\n    print('noise')\n    print('noise', file=sys.stderr)\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    assert run(server, "-c", LOAD, environ={"PYTHONPATH": path}) == EXPECTED


def test_paths_in_variables_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"NETRC": "netrc", "REQUESTS_CA_BUNDLE": "/ca.pem", "HF_HOME": "~/hf", "OTHER": "other"}
    assert absolute_paths(environ) == {**environ, "NETRC": str(tmp_path / "netrc")}


def test_arguments_hold_no_secret_and_the_environment_little() -> None:
    arguments = helper_arguments()
    assert arguments[0] == sys.executable
    assert arguments[-4:] == ["-m", "ndcache", "_helper", str(os.getpid())]
    environ = {
        "HF_TOKEN": "x",
        "PYTHONINSPECT": "1",
        "AWS_SESSION_TOKEN": "x",
        "LD_LIBRARY_PATH": "/x",
        "HOME": "/h",
    }
    assert helper_environ(environ).keys() - {"PYTHONPATH"} == {"LD_LIBRARY_PATH", "HOME", "PYTHONSAFEPATH"}


@pytest.mark.parametrize("text", ["", "no json\n", "{}\n", '{"package_root": "/nowhere"}\n'])
def test_a_helper_that_nobody_asked_ends(text: str) -> None:
    command = [sys.executable, "-m", "ndcache", "_helper", str(os.getpid())]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
