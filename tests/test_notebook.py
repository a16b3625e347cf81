r"""The notebook among the examples runs, and its outputs are those of a run; bars in the output of a cell.

To renew the outputs::

    python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
        --ExecutePreprocessor.store_widget_state=False examples/notebook.ipynb
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ndcache
from ndcache.progress import ProgressReport

from .helpers.models import simple_model
from .helpers.requirements import need_module
from .helpers.servers import FileServer

_NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"

# In the place of a kernel: a shell of IPython that collects what cells display.
_SHELL = """
import json
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

class Publisher(CapturingDisplayPublisher):
    def publish(self, data, metadata=None, source=None, *, transient=None, update=False, **others):
        super().publish(data, metadata, transient=transient, update=update)

class Stream:
    def write(self, text):
        raise AssertionError(f"standard error is not for bars: {text}")

import sys
sys.modules["ipywidgets"] = None
shell = InteractiveShell.instance(display_pub_class=Publisher)
shell.kernel = object()
errors, sys.stderr = sys.stderr, Stream()
"""

_BARS = """
from ndcache.progress import Reporter, notebook
notebook._SECONDS = 0.0
for fails in (False, True):
    reporter = Reporter(True, [1 << 20, 3 << 20], cache_only=False, model="host/<b>")
    reporter.start()
    reporter.shard_done(1 << 20)
    if not fails:
        reporter.shard_done(3 << 20)
    reporter.close(is_done=not fails)
Reporter(True, [1 << 20], cache_only=True, model="host/cached").close(is_done=True)
sys.stderr = errors
print(json.dumps(shell.display_pub.outputs))
"""


# The cells of a notebook.
_CELLS = [
    """
import sys, warnings
if {is_hidden}:
    sys.modules["ipywidgets"] = None
import ndcache
from ndcache.progress import notebook
warnings.simplefilter("error")
notebook._SECONDS = 0.0
def fetch(name, **options):
    ndcache.fetch("{url}" + name, cache_dir="cache", progress=True, **options)
fetch("model")
""",
    """
ndcache.load("{url}model", cache_dir="cache", progress=True);
""",
    """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor() as executor:
    list(executor.map(fetch, ["a/other", "b/other"]))
""",
    """
fetch("bad", retries=0, max_workers=1)
""",
    """
"hidden" if {is_hidden} else __import__("ipywidgets").Widget.get_manager_state()["state"]
""",
]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment for a kernel that leaves the user's own files alone."""
    names = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    paths = [str(Path(ndcache.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {name: str(folder / name.lower()) for name in names}
    return {**os.environ, **own, "JUPYTER_PLATFORM_DIRS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def outputs(notebook: str) -> list[list[tuple[str, str]]]:
    """Return the kind and the text of each output of each cell, without colours, and without what changes."""
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    return [[(each["output_type"], _text(each)) for each in cell["outputs"]] for cell in cells]


def _text(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    found = output.get("traceback") or output.get("text") or data.get("text/html") or data["text/plain"]
    text = ("\n" if "traceback" in output else "").join([found] if isinstance(found, str) else found)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"(?m)^(this thread|workers) .*$", r"\1", text)  # not all phases take 1 ms each time
    return re.sub(r"\d[\d,.]* (ms|s|[KM]iB/s)(?=$|,)", r"some time", text, flags=re.MULTILINE)


def execute(notebook: Path, folder: Path) -> str:
    """Return a notebook with the outputs of a run."""
    need_module("nbconvert")
    need_module("ipykernel")
    need_module("ipywidgets")
    command = ["nbconvert", "--to", "notebook", "--execute", "--stdout", "--log-level", "ERROR", str(notebook)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment(folder),
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.once
def test_the_notebook_has_the_outputs_of_a_run(tmp_path: Path) -> None:
    found = outputs(execute(_NOTEBOOK, tmp_path))
    assert found == outputs(_NOTEBOOK.read_text("utf-8"))
    (fetched,), (mapped,), (table,), (names,), (stats,), (no_tensor,), (offline,), _ = found[1:]
    assert fetched[1] == "Fetched tiny-model: 16.0 MiB in 17 shards, some time, some time"
    assert mapped[1] == "Mapped tiny-model: 16.0 MiB in 17 shards, some time"
    assert "<td" in table[1]
    assert names[1] == "['model.layers.0.q_proj.weight', 'model.layers.0.k_proj.weight']"
    assert len(stats[1].splitlines()) == 7
    assert "did you mean 'model.norm.weight'?" in no_tensor[1]
    assert "Cell In[8], line 1\n----> 1 ndcache.load(" in offline[1]


@pytest.mark.once
def test_the_notebook_has_no_path_of_a_machine() -> None:
    text = _NOTEBOOK.read_text("utf-8")
    assert not re.search(r"site-packages|/(home|root|tmp|usr|work)\b", text)
    assert not any(".py" in shown for cell in outputs(text) for _, shown in cell)


@pytest.mark.once
@pytest.mark.parametrize("is_hidden", [False, True], ids=["with ipywidgets", "without ipywidgets"])
def test_bars_of_a_kernel(tmp_path: Path, serve: Callable[..., FileServer], is_hidden: bool) -> None:
    """A kernel says what a page would get; of a widget, it keeps the last state."""
    for index, name in enumerate(("model", "a/other", "b/other", "bad")):
        simple_model(tmp_path / "www" / name, shards=3, seed=10 * index)
    (tmp_path / "www" / "bad" / "params_shard_2.bin").unlink()
    server = serve(tmp_path / "www")
    values = {"url": server.url, "is_hidden": is_hidden}
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": cell.format(**values)}
        for cell in _CELLS
    ]
    cells[3]["metadata"] = {"tags": ["raises-exception"]}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    path = tmp_path / "bars.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}))
    executed = execute(path, tmp_path)
    (fetched,), (mapped,), others, (failed, (kind, error)), (left,) = outputs(executed)
    assert fetched == ("display_data", "Fetched model: 192.0 KiB in 3 shards, some time, some time")
    assert mapped == ("display_data", "Mapped model: 192.0 KiB in 3 shards, some time")
    names = {text.partition(":")[0].removeprefix("Fetched ") for _, text in others}
    assert names in ({"other", "a/other"}, {"other", "b/other"})
    assert failed[0] == "display_data"
    assert re.fullmatch(r"bad +\d+%  [\d.]+( B)?/192\.0 KiB  \d/3 shards", failed[1])
    assert (kind, "NotFoundError" in error) == ("error", True)
    assert left[1] == ("'hidden'" if is_hidden else "{}")  # all parts of all widgets are closed
    assert ("FloatProgressModel" in executed) is not is_hidden


@pytest.mark.once
def test_the_texts_of_a_widget() -> None:
    """Its spaces are as wide as digits only where they stand in the place of digits, or part the texts."""
    need_module("ipywidgets")
    from ndcache.progress.widget import WidgetBar

    report = ProgressReport(0.05, 1.0, False, "", "fetch", 1, 2, 1 << 20, 20 << 20, 1 << 20, model="model")
    bar = WidgetBar(report)
    left, _, right = bar.container.children
    assert (left.value, right.value) == (
        "model\u2007\u2007\u20075%",
        "1.0/20.0\xa0MiB\u2007\u20071.0\xa0MiB/s\u2007\u20070/2\xa0shards",
    )
    assert (left.layout.flex, right.layout.flex) == ("none", "none")
    bar.close()


@pytest.mark.once
def test_a_bar_in_a_notebook(tmp_path: Path) -> None:
    need_module("IPython")
    done = subprocess.run(
        [sys.executable, "-c", _SHELL + _BARS],
        env=environment(tmp_path),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    ids = [(each["transient"] or {}).get("display_id") for each in shown]
    first = [each["data"] for each, key in zip(shown, ids, strict=True) if key == ids[0]]
    assert re.fullmatch(r"<b>  25%  1\.0/4\.0 MiB  (.*iB/s  )?1/2 shards", first[-3]["text/plain"])
    assert '<span>&lt;b&gt;  25%</span><progress value="0.2500"' in first[-3]["text/html"]
    assert list(first[-1]) == ["text/plain"]  # nothing else is left
    assert first[-1]["text/plain"].startswith("Fetched <b>: 4.0 MiB in 2 shards, ")
    assert [each["update"] for each in shown] == [False, *[True] * 4, False, *[True] * 3, False]
    assert list(shown[-2]["data"]) == ["text/plain"]
    assert shown[-2]["data"]["text/plain"].startswith("<b>  25%  1.0/4.0 MiB  ")
    assert shown[-1]["data"]["text/plain"].startswith("Loaded cached: 1.0 MiB in 1 shard")
