"""Run nginx on a free port of loopback: plain, with a rate per connection, with TLS, or with a log of its answers.

It is the one of the environment variable ``NGINX``, else that of ``PATH`` or /usr/sbin.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A revision, which huggingface_hub needs.
COMMIT = "0" * 40


def program() -> str | None:
    """Return the path of nginx, or None if it is not installed."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"
    return shutil.which(os.environ.get("NGINX") or "nginx", path=path)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def nginx(
    directory: Path, *, rate: int = 0, tls: bool = False, log: Path | None = None
) -> Iterator[tuple[str, str | None]]:
    """Serve a directory; yield its URL, and with TLS the path of the authority's certificate.

    Parameters
    ----------
    rate : int
        Bytes per second and connection; 0 is no limit.
    log : pathlib.Path or None
        The file that gets a line for each response: the bytes of its body, and its path.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as state:
        folder = Path(state)
        ca = _certificates(folder) if tls else None
        listen = f"listen 127.0.0.1:{port}" + (" ssl" if tls else "")
        secure = f"ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;" if tls else ""
        temporary = "".join(
            f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        access = f"log_format bytes '$body_bytes_sent $uri'; access_log {log} bytes;" if log else "access_log off;"
        # nginx sends as much as the socket takes, and only then waits as long as that should have taken.
        limit = f"limit_rate {rate}; sendfile_max_chunk {max(1, rate // 100)};" if rate else ""
        json = "default_type application/json;"
        commit = f"add_header X-Repo-Commit {COMMIT};"
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; pid {folder}/pid; error_log stderr; worker_processes {max(2, cores())};"
            f"{'user root;' if os.geteuid() == 0 else ''} events {{}}"
            f"http {{ {temporary} {access} sendfile on; {limit}"
            f"server {{ {listen}; {secure} root {directory};"
            f"location ~ ^/bench/model/resolve/[^/]+/(.*) {{ alias {directory}/$1; {commit} }}"
            f"location ~ ^/api/models/bench/model/(revision|tree)/ {{ {json} alias {directory}/$1.json; }} }} }}"
        )
        errors = folder / "errors"
        with open(errors, "wb") as stderr:
            process = subprocess.Popen([program() or "nginx", "-p", state, "-c", str(config)], stderr=stderr)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    raise RuntimeError(f"nginx does not start: {errors.read_text()}")
                time.sleep(0.02)
            yield f"{'https' if tls else 'http'}://127.0.0.1:{port}/", ca
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _certificates(folder: Path) -> str:
    import trustme

    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return str(folder / "ca.pem")
