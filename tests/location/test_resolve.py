"""Locations of models, from the sources that users type."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import pytest

from ndcache.errors import NotFoundError
from ndcache.location import MANIFEST_NAMES, Location, locate
from ndcache.location.hub import HF_ENDPOINT, hf_endpoint

B16 = ("tensor-cache-b16.json",)
HF = "https://huggingface.co/owner/name/resolve"


def remote(source: str, **environ: str) -> Location:
    location = locate(source, environ)
    assert location.is_remote
    assert location.directory is None
    assert location.base.endswith("/")
    return location


@pytest.mark.parametrize(
    ("source", "base", "names"),
    [
        ("https://host/model/", "https://host/model/", MANIFEST_NAMES),
        ("https://host/model", "https://host/model/", MANIFEST_NAMES),
        ("https://host/model//", "https://host/model/", MANIFEST_NAMES),
        ("  https://host/model/\n", "https://host/model/", MANIFEST_NAMES),
        ("http://host:8080/a/b/", "http://host:8080/a/b/", MANIFEST_NAMES),
        ("HTTPS://Host/Model", "https://host/Model/", MANIFEST_NAMES),
        ("https://host", "https://host/", MANIFEST_NAMES),
        ("https://host/", "https://host/", MANIFEST_NAMES),
        ("https://host/model/tensor-cache-b16.json", "https://host/model/", B16),
        ("https://host/tensor-cache-b16.json", "https://host/", B16),
        ("https://host/model.json/", "https://host/model.json/", MANIFEST_NAMES),
        ("https://host/a b/ü/", "https://host/a%20b/%C3%BC/", MANIFEST_NAMES),
        ("https://host/a%20b/", "https://host/a%20b/", MANIFEST_NAMES),
        ("https://host/a%2Fb/", "https://host/a%2Fb/", MANIFEST_NAMES),
        ("https://host/100%/x", "https://host/100%25/x/", MANIFEST_NAMES),
        ("https://host/a:b@c/", "https://host/a:b@c/", MANIFEST_NAMES),
        ("https://host/model/#readme", "https://host/model/", MANIFEST_NAMES),
        ("http://[::1]:8000/model", "http://[::1]:8000/model/", MANIFEST_NAMES),
        ("http://[FE80:0::1]/model", "http://[fe80::1]/model/", MANIFEST_NAMES),
        ("http://127.0.0.1/model", "http://127.0.0.1/model/", MANIFEST_NAMES),
        ("https://user:pass@host/model", "https://user:pass@host/model/", MANIFEST_NAMES),
        ("s3://bucket", "s3://bucket/", MANIFEST_NAMES),
        ("S3://Bucket.1/a b/ü", "s3://Bucket.1/a%20b/%C3%BC/", MANIFEST_NAMES),
        ("gs://bucket/a@b:c/tensor-cache-b16.json", "gs://bucket/a@b:c/", B16),
        ("az://$web/model/", "az://$web/model/", MANIFEST_NAMES),
        ("hf://owner/name", f"{HF}/main/", MANIFEST_NAMES),
        ("HF://owner/name", f"{HF}/main/", MANIFEST_NAMES),
        ("hf://owner/name/", f"{HF}/main/", MANIFEST_NAMES),
        ("hf://Owner-1/Na_me.v1", "https://huggingface.co/Owner-1/Na_me.v1/resolve/main/", MANIFEST_NAMES),
        ("hf://owner/name@v1.0", f"{HF}/v1.0/", MANIFEST_NAMES),
        ("hf://owner/name@refs%2Fpr%2F1", f"{HF}/refs%2Fpr%2F1/", MANIFEST_NAMES),
        ("hf://owner/name@refs%2fpr%2f1/sub", f"{HF}/refs%2Fpr%2F1/sub/", MANIFEST_NAMES),
        ("hf://owner/name/sub/folder", f"{HF}/main/sub/folder/", MANIFEST_NAMES),
        ("hf://owner/name/sub folder/", f"{HF}/main/sub%20folder/", MANIFEST_NAMES),
        ("hf://owner/name@dev/sub/tensor-cache-b16.json", f"{HF}/dev/sub/", B16),
        ("hf://owner/name/tensor-cache-b16.json", f"{HF}/main/", B16),
        ("https://huggingface.co/owner/name", f"{HF}/main/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/", f"{HF}/main/", MANIFEST_NAMES),
        ("https://HuggingFace.co/owner/name?library=mlc#x", f"{HF}/main/", MANIFEST_NAMES),
        ("http://huggingface.co/owner/name", f"{HF}/main/", MANIFEST_NAMES),
        ("https://hf.co/owner/name", f"{HF}/main/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/tree/main", f"{HF}/main/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F1/sub", f"{HF}/refs%2Fpr%2F1/sub/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/tree/a@b/sub", f"{HF}/a%40b/sub/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/blob/dev/tensor-cache-b16.json", f"{HF}/dev/", B16),
        ("https://huggingface.co/owner/name/blob/dev/a/tensor-cache-b16.json?x=1", f"{HF}/dev/a/", B16),
        ("https://huggingface.co/owner/name/resolve/dev/", f"{HF}/dev/", MANIFEST_NAMES),
        ("https://huggingface.co/owner/name/resolve/dev/tensor-cache-b16.json", f"{HF}/dev/", B16),
        ("https://huggingface.co.evil.test/owner/name", "https://huggingface.co.evil.test/owner/name/", MANIFEST_NAMES),
    ],
)
def test_remote(source: str, base: str, names: tuple[str, ...]) -> None:
    location = remote(source)
    assert (location.base, location.manifest_names) == (base, names)


@pytest.mark.parametrize("endpoint", ["https://mirror.test", "https://mirror.test/", "http://127.0.0.1:80/hf/"])
def test_endpoint(endpoint: str) -> None:
    bare = endpoint.rstrip("/")
    assert str(hf_endpoint({"HF_ENDPOINT": endpoint})).rstrip("/") == bare
    assert remote("hf://owner/name@v1", HF_ENDPOINT=endpoint).base == f"{bare}/owner/name/resolve/v1/"
    assert remote(f"{bare}/owner/name/tree/v1", HF_ENDPOINT=endpoint).base == f"{bare}/owner/name/resolve/v1/"
    # The host of a page stays as it is.
    assert remote("https://huggingface.co/owner/name", HF_ENDPOINT=endpoint).base == f"{HF}/main/"


def test_endpoint_unset_or_empty() -> None:
    assert str(hf_endpoint({})) == str(hf_endpoint({"HF_ENDPOINT": ""})) == f"{HF_ENDPOINT}/"


@pytest.mark.parametrize("endpoint", ["mirror.test", "s3://bucket"])
def test_endpoint_that_is_no_server(endpoint: str) -> None:
    with pytest.raises(ValueError, match="HF_ENDPOINT"):
        locate("hf://owner/name", {"HF_ENDPOINT": endpoint})


# --- local --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "a model@1"
    directory.mkdir()
    (directory / "tensor-cache-b16.json").write_text("{}")
    return directory


def test_local_directory(model: Path) -> None:
    uri = model.as_uri()
    sources: list[str | Path] = [str(model), f"{model}/", f" {model} ", model, uri, uri.replace("file:", "FILE:")]
    for source in [*sources, f"file://localhost{uri[7:]}", f"file:{uri[7:]}"]:
        location = locate(source)
        assert location == Location("", "", model, MANIFEST_NAMES)
        assert not location.is_remote
        assert str(location) == str(model)


def test_local_manifest(model: Path) -> None:
    file = model / "tensor-cache-b16.json"
    for source in (str(file), file, file.as_uri()):
        assert locate(source) == Location("", "", model, B16)


def test_relative_paths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    for source in (model.name, f"./{model.name}", Path(model.name), f"{model.name}/../{model.name}"):
        directory = locate(source).directory
        assert directory is not None
        assert directory.resolve() == model.resolve()
    monkeypatch.chdir(model)
    assert locate(".").directory == Path()
    assert locate("tensor-cache-b16.json") == Location("", "", Path(), B16)


def test_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.setenv("USERPROFILE", str(model.parent))
    assert locate(f"~/{model.name}").directory == model
    assert locate(Path("~") / model.name).directory == model


def test_a_directory_goes_before_what_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@main").mkdir(parents=True)
    assert locate("owner/name@main").directory == Path("owner/name@main")


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("huggingface.co/owner/name", "https://"),
        ("huggingface.co/owner", "https://"),
        ("localhost:8000/model", "https://"),
        ("owner/name", "hf://owner/name"),
        ("owner/name@v1", "hf://owner/name@v1"),
        ("hf:/x", "hf://"),
        ("hf:owner/name", "hf://"),
        ("https:/host/model", "https://"),
        ("http:host/model", "http://"),
        ("no-such-directory", "no such directory"),
        ("C:\\models\\x", "no such directory"),
        ("C:/models/x", "no such directory"),
        ("\\\\server\\share\\x", "no such directory"),
        ("file:///no/such/directory", "no such directory"),
        ("file:///no/such%20one", "/no/such one"),
        ("~no-such-user-here/model", "no-such-user-here"),
        ("x" * 100_000, "xxx"),
        ("a\0b", "a\\x00b"),
    ],
)
def test_nothing_there(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        locate(source)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_url_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        locate(Path("https://user:secret@host/model?token=secret"))
    assert "https://" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_wrong_manifest_name(model: Path) -> None:
    for index in range(20):
        (model / f"{index}.json").touch()
    with pytest.raises(NotFoundError, match=r"0\.json.*and 16 more"):
        locate(model / "tensor-cache.json")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("htp://host/model", "htp://"),
        ("ftp://host/model", "ftp://"),
        ("s3a://bucket/model", "write s3://"),
        ("ftp://host/model", "not supported"),
        ("://host", "not supported"),
        ('{"url": "https://host/"}' * 1000, "not supported"),
        ("user:secret@x://host", "not supported"),
        ("https://", "no host"),
        ("https:///model", "no host"),
        ("https://?x", "no host"),
        ("https://:80/model", "no host"),
        ("https://user:secret@/model", "no host"),
        ("https://ho st/model", "cannot be a host"),
        ("https://host\\model/", "backslash"),
        ("https://{host}/model", "cannot be a host"),
        ("https://h\udc80/model", "control character"),
        ("https://host:x/model", "port"),
        ("https://host:99999/model", "https://host:99999/model"),
        ("https://host:-1/model", "port"),
        ("https://host:0/model", "port"),
        ("https://user:sec/secret@host/model", "unreadable"),
        ("http://[::1/model", "cannot be read"),
        ("http://[fe80::1%25eth0]/model", "IPv6"),
        ("https://host:/a/model/", "port"),
        ("hf://", "hf://owner/name"),
        ("hf://owner", "hf://owner/name"),
        ("hf:///owner/name", "hf://owner/name"),
        ("hf://owner/name@", "hf://owner/name"),
        ("hf://owner/name@/sub", "hf://owner/name"),
        ("hf://owner/name?revision=secret", "hf://owner/name"),
        ("hf://user:secret@owner/name", "hf://owner/name"),
        ("hf://user:secret/name", "hf://owner/name"),
        ("hf://ow ner/name", "hf://owner/name"),
        ("hf://../name", "hf://owner/name"),
        ("hf://owner/..", "hf://owner/name"),
        ("hf://owner/name@..", "hf://owner/name"),
        ("hf://owner/name@%2e%2e", "hf://owner/name"),
        ("hf://owner/name@a%2f..%2f..", "hf://owner/name"),
        ("hf://owner/name/../../x", "hf://owner/name"),
        ("hf://owner/name/%2e%2e/x", "hf://owner/name"),
        ("hf://owner/name/..%5c../x", "hf://owner/name"),
        ("file://host/model", "names no host"),
        ("file://user:secret@host/model", "names no host"),
    ],
)
def test_not_understood(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        locate(source)
    text = f"{caught.value}{caught.value.__cause__}"
    assert words in text
    assert "secret" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("source", [None, 1, b"https://host/", ["https://host/"]])
def test_not_a_source(source: object) -> None:
    with pytest.raises(TypeError, match=r"the source must be a text or a path, not (NoneType|int|bytes|list)$"):
        locate(source)  # type: ignore[arg-type]


# --- URLs ---------------------------------------------------------------------------------------------


def test_query_is_kept_for_requests() -> None:
    location = remote("https://host/model?sv=1&sig=a%2Bb=#x")
    assert location.base == "https://host/model/"
    assert location.url("a b.bin") == "https://host/model/a%20b.bin?sv=1&sig=a%2Bb="
    location = remote("https://host/model/tensor-cache-b16.json?sig=x")
    assert location.url(location.manifest_names[0]) == "https://host/model/tensor-cache-b16.json?sig=x"


@pytest.mark.parametrize(
    ("path", "quoted"),
    [
        ("params_shard_0.bin", "params_shard_0.bin"),
        ("a/b.bin", "a/b.bin"),
        ("a b.bin", "a%20b.bin"),
        ("ü.bin", "%C3%BC.bin"),
        ("モデル/x.bin", "%E3%83%A2%E3%83%87%E3%83%AB/x.bin"),
        ("a#b.bin", "a%23b.bin"),
        ("a?b.bin", "a%3Fb.bin"),
        ("a%20b.bin", "a%20b.bin"),
        ("100%.bin", "100%25.bin"),
        ("100%zz.bin", "100%25zz.bin"),
        ("%", "%25"),
        ("%4", "%254"),
        ("%%41", "%25%41"),
        ("a&b=c;d,e+f@g!h~i(j)'$.bin", "a&b=c;d,e+f@g!h~i(j)'$.bin"),
        ("x:y.bin", "x:y.bin"),
        ("//evil.test/x", "//evil.test/x"),
        ("a\\b", "a%5Cb"),
        ("a\r\nb", "a%0D%0Ab"),
    ],
)
def test_url_of_a_file(path: str, quoted: str) -> None:
    base = "https://user:pass@host:8443/a%20b/"
    url = remote(base).url(path)
    assert url == base + quoted
    parts = urlsplit(url)
    assert (parts.hostname, parts.port, parts.query, parts.fragment) == ("host", 8443, "", "")
    assert urljoin(url, "") == url
    # `requests` leaves it as it is: quoting a quoted text changes nothing.
    assert remote(url + "/").base == url + "/"


@pytest.mark.parametrize(
    "name", ["x.json", "a%20b.json", "a%2Bb.json", "%C3%BC.json", "a%2Fb.json", "100%25.json", "a+b.json"]
)
def test_url_of_a_manifest_is_the_one_given(name: str) -> None:
    location = remote(f"https://host/model/{name}")
    assert remote(location.url(location.manifest_names[0])) == location
    assert unquote_to_bytes(location.url(location.manifest_names[0])) == unquote_to_bytes(f"https://host/model/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "..%2F..%2Fx.json",
        "%2e%2e%2fx.json",
        "%2Fetc%2Fx.json",
        "..%5Cx.json",
        "C%3Ax.json",
        "C:x.json",
        "x%00.json",
        "x%0A.json",
        ".ndcache%2Fx.json",
        "x%3Fy.json",
        "x*.json",
        "%FF.json",
    ],
)
def test_a_manifest_name_is_one_file_name(name: str, tmp_path: Path) -> None:
    (found,) = remote(f"https://host/model/{name}").manifest_names
    assert not set(found) & set('/\\:*?"<>|\0')
    assert found.isprintable()
    assert Path(os.path.normpath(tmp_path / found)).parent == tmp_path


def test_a_readable_manifest_name_is_decoded() -> None:
    assert remote("https://host/m/my%20model%20%C3%BC.json").manifest_names == ("my model ü.json",)


# --- cache keys ---------------------------------------------------------------------------------------

SAME = [
    "https://host/a/model/",
    "https://host/a/model",
    "https://HOST/a/model/",
    "HTTPS://host/a/model/",
    "https://host:443/a/model/",
    "https://user:secret@host/a/model/",
    "https://user:other@Host:443/a/model/",
    "https://host/a/model/?sig=secret",
    "https://host/a/model/#secret",
    "https://host/a/model/tensor-cache.json",
    "https://host/a/model/tensor-cache-b16.json?sig=secret",
]

DIFFERENT = [
    "https://host/a/model/",
    "http://host/a/model/",
    "https://host:8443/a/model/",
    "https://host:80/a/model/",
    "http://host:443/a/model/",
    "https://host2/a/model/",
    "https://host/a/Model/",
    "https://host/a/model2/",
    "https://host/a--model/",
    "https://host/a%2Fmodel/",
    "https://host/a/model/b/",
    "https://host/",
    "https://host/" + "x" * 200,
    "https://host/" + "x" * 201,
    "https://host/ü/",
    "https://host/ö/",
    "https://例え/",
    "http://[::1]/",
    "http://[::2]/",
    "hf://owner/name",
    "hf://owner/name@dev",
    "hf://owner/name2",
    "hf://owner/name/sub",
]


def test_one_key_for_one_model() -> None:
    assert len({remote(source).cache_key for source in SAME}) == 1
    assert remote("https://huggingface.co/owner/name").cache_key == remote("HF://owner/name@main").cache_key
    assert remote("https://host/ü b/").cache_key == remote("https://host/%C3%BC%20b/").cache_key


def test_another_key_for_another_model() -> None:
    keys = [remote(source).cache_key for source in DIFFERENT]
    assert len({key.lower() for key in keys}) == len(DIFFERENT)  # on a file system without letter case, too


@pytest.mark.parametrize("source", [*SAME, *DIFFERENT, "https://con/", "https://host/..", "https://-/-/"])
def test_keys_are_directory_names(source: str) -> None:
    key = remote(source).cache_key
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert key[0] not in ".-"
    assert "secret" not in key
    assert "user" not in key
    assert len(key) <= 120
    assert key.rpartition("--")[0]


def test_keys_stay_what_they_are() -> None:
    # A cache filled by an earlier version must be found again.
    assert remote("https://host/a/model/").cache_key == "host--a--model--015aba53029ce047"


@pytest.mark.parametrize("source", ["https://user:secret@host/model?sig=secret", "https://secret@host/x.json#secret"])
def test_row_40_a_location_shows_no_secrets(source: str) -> None:
    location = remote(source)
    assert "secret" in location.base + location.query
    for shown in (str(location), repr(location), f"{location}", location.cache_key):
        assert "secret" not in shown
        assert "host" in shown or shown.startswith("Location(")
