"""Loads while Python is shutting down: in threads that outlive the main thread, and in atexit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ndcache

from .helpers import models
from .helpers.servers import FileServer

#: The beginning of all scripts. `until_the_end` waits until the main thread has ended.
PROLOGUE = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import ndcache, requests
url, cache, local = sys.argv[1:]
ndcache.load(local)

def until_the_end():
    while not threading._SHUTTING_DOWN:
        time.sleep(0.001)
    time.sleep(0.1)

class Session(requests.Session):
    def get(self, asked, **options):
        if asked.endswith(gate):
            begun.set()
            until_the_end()
        return super().get(asked, **options)

gate, begun = "_0.bin", threading.Event()

def say(work):
    try:
        print(len(list(work())), flush=True)
    except BaseException as error:
        print(repr(error), flush=True)

def load(source=url, **options):
    return ndcache.load(source, cache_dir=cache, **options)
"""

SCRIPTS = {
    "began before": "threading.Thread(target=say, args=[lambda: load(session=Session())]).start(); begun.wait()",
    "manifest": "gate = '.json'\n"
    "threading.Thread(target=say, args=[lambda: load(session=Session())]).start(); begun.wait()",
    "one worker": "threading.Thread(target=say, args=[lambda: load(session=Session(), max_workers=1)]).start()\n"
    "begun.wait()",
    "streamed": "threading.Thread(target=say, args=[lambda: ndcache.stream(url, cache_dir=cache, session=Session())])"
    ".start(); begun.wait()",
    "in a pool of the caller's": "pool = ThreadPoolExecutor(1)\npool.submit(say, lambda: load(session=Session()))\n"
    "pool.submit(say, load); begun.wait()",
    "began afterwards": "threading.Thread(target=lambda: (until_the_end(), say(load))).start()",
    "began afterwards, local": "threading.Thread(target=lambda: (until_the_end(), say(lambda: load(local)))).start()",
    "atexit": "atexit.register(say, load)",
    "atexit, cached": "load(); atexit.register(say, load)",
    "atexit, streamed": "atexit.register(say, lambda: ndcache.stream(url, cache_dir=cache))",
    "closed in atexit": "stream = ndcache.stream(url, cache_dir=cache); next(stream)\n"
    "atexit.register(lambda: (stream.close(), say(lambda: 'four')))",
    # Results that nobody will take do not delay the end of Python.
    "left by a thread": "stream = ndcache.stream(url, cache_dir=cache)\n"
    "thread = threading.Thread(target=lambda: (next(stream), say(lambda: 'four'))); thread.start(); thread.join()",
    "left by a thread that ends later": "stream = ndcache.stream(url, cache_dir=cache)\n"
    "threading.Thread(target=lambda: (next(stream), until_the_end(), say(lambda: 'four'))).start()",
    "never begun": "stream = ndcache.stream(url, cache_dir=cache); say(lambda: 'four')",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_row_63_loads_finish_while_python_is_shutting_down(tmp_path: Path, what: str) -> None:
    models.simple_model(tmp_path / "www", shards=4)
    server = FileServer(tmp_path / "www")
    try:
        arguments = [server.url, str(tmp_path / "cache"), str(tmp_path / "www")]
        child = subprocess.run(
            [sys.executable, "-c", PROLOGUE + SCRIPTS[what], *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.close()
    count = str(4 if "four" in SCRIPTS[what] else len(ndcache.load(tmp_path / "www")))
    assert (child.returncode, set(child.stdout.split("\n"))) == (0, {count, ""}), child.stderr
