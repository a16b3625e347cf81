"""An nginx that limits requests, on a loopback socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .requirements import need_program

_CONFIGURATION = """
daemon off;
user {user} {group};
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 256; }}
http {{
    log_format times "$msec $status $uri";
    access_log access.log times;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    limit_conn_zone $binary_remote_addr zone=connections:1m;
    limit_req_zone $binary_remote_addr zone=requests:1m rate=5r/s;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location ~ bin$ {{ {limit} }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(prefix: Path, root: Path, limit: str) -> Iterator[str]:
    """Serve `root`, its shards with a limit, from an nginx whose files lie in `prefix`; yield its URL.

    The zone ``requests`` lets 5 requests per second pass.
    """
    import grp
    import pwd

    program = need_program("nginx")
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    prefix.mkdir()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        configuration = _CONFIGURATION.format(port=port, user=user, group=group, root=root, limit=limit)
        (prefix / "nginx.conf").write_text(configuration)
        process = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(prefix), "-c", "nginx.conf"],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


def statuses(prefix: Path) -> list[tuple[float, int]]:
    """Return the time and the status of each response so far."""
    lines = [line.split() for line in (prefix / "access.log").read_text().splitlines()]
    return [(float(moment), int(status)) for moment, status, _ in lines]
