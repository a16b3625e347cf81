"""Models in buckets, from servers that check signatures."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import obstore.exceptions
import obstore.store
import pytest

import ndcache
from ndcache import tvm
from ndcache.cloud import storage
from ndcache.cloud.storage import ObjectStorage
from ndcache.workers.cancellation import Cancellation

from ..helpers.buckets import ACCESS_KEY, AZURE_KEY, SECRET, BucketServer, s3rver, service_account
from ..helpers.models import assert_same, simple_model
from ..helpers.servers import Connection, Request, ScriptedServer, reply
from ..helpers.tensor_files import write_files
from ..test_secrets import everything

Bucket = tuple[BucketServer, dict[str, Any]]

every_storage = pytest.mark.parametrize("bucket", ["s3", "gs", "az"], indirect=True)
#: obstore signs names with such characters for Azure in a way that Azure does not.
FOLDER = {"s3": "a model/ü", "gs": "a model/ü", "az": "model"}


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Serve a model in the storage that the test is for, by default S3, with credentials in the environment."""
    scheme = getattr(request, "param", "s3")
    arrays = simple_model(tmp_path / "www/bucket" / FOLDER[scheme])
    server = BucketServer(tmp_path / "www", scheme)
    # The machine that runs the tests has no credentials of its own.
    for name, value in {
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
        **server.environment,
    }.items():
        monkeypatch.setenv(name, value)
    yield server, arrays
    server.close()


def source(server: BucketServer) -> str:
    return f"{server.scheme}://bucket/{FOLDER[server.scheme]}/"


def renew_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let signatures from now on differ from those before: one made in the same second would be the same."""
    monkeypatch.setattr(storage, "_VALID", storage._VALID - timedelta(minutes=1))


@every_storage
def test_a_model_in_a_bucket_is_loaded_by_signed_addresses(bucket: Bucket, cache_dir: Path) -> None:
    server, arrays = bucket
    with ndcache.load(source(server), files=False) as weights:
        assert_same(weights, arrays)
        assert weights.stats.requests == len(server.requests) == len(server.signatures) == 5
    with ndcache.load(source(server), files=False) as weights:
        assert_same(weights, arrays)
    assert len(server.requests) == 6, "a warm load asks for the manifest alone"
    assert not server.refused
    (note,) = cache_dir.rglob("source.json")
    assert json.loads(note.read_text())["source"] == source(server).replace(" ", "%20").replace("ü", "%C3%BC")
    assert ndcache.delete(source(server)) > 0


@every_storage
def test_row_96_a_transfer_resumes_by_an_address_that_is_signed_anew(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address for a shard breaks off and then has expired; identity and ETag do not depend on it."""
    server, arrays = bucket
    broken: list[str] = []

    def expired(signature: str) -> bool:
        if server.signatures.count(signature) == 2:
            renew_differently(monkeypatch)
            broken.append(signature)
        return signature in broken

    server.expired = expired
    server.cut[server.path(f"bucket/{FOLDER[server.scheme]}/params_shard_1.bin")] = 40_000
    with ndcache.load(source(server), max_workers=1) as weights:
        assert_same(weights, arrays)
    requests = [each for each in server.requests if each.path.endswith("shard_1.bin")]
    assert len(broken) == len(server.refused) == 1
    assert [each.headers.get("range") for each in requests] == [None, "bytes=40000-65535", "bytes=40000-65535"]
    assert requests[2].headers["if-range"] == requests[1].headers["if-range"]
    assert requests[0].target == requests[1].target != requests[2].target


@every_storage
def test_row_96_an_address_is_renewed_before_it_expires(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = bucket
    objects, seen, now = ObjectStorage(), list[str](), time.time()
    monkeypatch.setattr(time, "time", lambda: now)

    def sent(after: float) -> str:
        nonlocal now
        now += after
        seen.append(objects.get(f"{source(server)}x.bin", lambda address: address.url, Cancellation()))
        renew_differently(monkeypatch)
        return seen[-1]

    first = sent(0)
    assert sent(1000) == first
    assert sent(1000) != first, "more than half of its hour has passed"
    assert sent(-9000) != seen[-2], "the clock was set back"


@every_storage
def test_row_97_a_refusal_that_says_expired_ends_after_one_renewal(bucket: Bucket) -> None:
    server, _ = bucket
    server.expired = lambda signature: True
    with pytest.raises(ndcache.AuthError, match=r"expired.*clock") as caught:
        ndcache.load(source(server) + "tensor-cache.json")
    assert caught.value.status == 403
    assert len(server.requests) == 2


@every_storage
def test_row_97_wrong_credentials_are_an_auth_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = bucket
    server.secret = "another"
    with pytest.raises(ndcache.AuthError, match=r"(DoesNotMatch|AuthenticationFailed): the credentials are wrong"):
        ndcache.load(source(server) + "tensor-cache.json")
    assert len(server.requests) == 1
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDANOTHER")
    if server.scheme == "s3":
        with pytest.raises(ndcache.AuthError, match="InvalidAccessKeyId"):
            ndcache.load(source(server))


@pytest.mark.parametrize("bucket", ["az"], indirect=True)
def test_row_97_a_name_that_obstore_signs_wrongly(bucket: Bucket) -> None:
    with pytest.raises(ndcache.AuthError, match=r"AZURE_STORAGE_SAS_TOKEN\) works for all names"):
        ndcache.load("az://bucket/a model/ü/")


CANNOT_SIGN = {
    "s3": {"AWS_ACCESS_KEY_ID": "", "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere", "AWS_ROLE_ARN": "role"},
    "gs": {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**service_account(), "private_key": SECRET})},
    "az": {"AZURE_STORAGE_ACCOUNT_KEY": f"{SECRET}!"},
}


@every_storage
def test_row_98_credentials_that_cannot_sign_are_one_auth_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = bucket
    for name, value in CANNOT_SIGN[server.scheme].items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    with pytest.raises(ndcache.AuthError) as caught:
        ndcache.load(source(server))
    assert caught.value.hint
    assert SECRET not in everything(caught.value)
    assert not server.requests


@every_storage
def test_row_99_a_public_bucket_is_read_without_signatures(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    server, arrays = bucket
    server.is_public = True
    for name in server.secret_names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url.rstrip("/"))
    with ndcache.load(source(server), files=False) as weights:
        assert_same(weights, arrays)
    assert not any("?" in request.target for request in server.requests)
    if server.scheme == "az":
        assert {request.headers["x-ms-version"] for request in server.requests} == {"2021-12-02"}


def test_row_99_a_bucket_that_needs_credentials_says_so(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = bucket
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ndcache.AuthError, match=r"asked without credentials.*Set AWS_ACCESS_KEY_ID"):
        ndcache.load(source(server))
    assert len(server.requests) == 4, "one for each name of a manifest or a safetensors file"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    with pytest.raises(ndcache.AuthError):
        ndcache.load(source(server))
    assert not server.signatures


def test_the_metadata_of_a_machine_has_credentials(
    bucket: Bucket, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, arrays = bucket
    for name in server.secret_names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", scripted.url.rstrip("/"))
    found = {
        "AccessKeyId": ACCESS_KEY,
        "SecretAccessKey": SECRET,
        "Token": "session",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    folder = "/latest/meta-data/iam/security-credentials/"
    scripted.script = {
        "/latest/api/token": [reply(body=b"token")],
        folder: [reply(body=b"role")],
        f"{folder}role": [reply(body=json.dumps(found).encode())],
    }
    with ndcache.load(source(server), files=False) as weights:
        assert_same(weights, arrays)
    assert server.refused == ["AccessDenied"], "the first request tries whether the bucket is public"
    assert all("X-Amz-Security-Token=session" in request.target for request in server.requests[1:])


def test_a_wait_for_credentials_can_be_cancelled(
    bucket: Bucket, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = bucket
    for name in server.secret_names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", scripted.url.rstrip("/"))
    cancel = threading.Event()

    def stall(connection: Connection, request: Request) -> None:
        cancel.set()
        connection.stall()

    scripted.script = {"/latest/api/token": [stall]}
    with pytest.raises(ndcache.CancelledError):
        ndcache.load(source(server), cancel=cancel)
    assert len(scripted.requests) == 1, "left alone, obstore would ask twice more"


def test_a_shared_access_signature_of_azure_goes_along(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    server, arrays = bucket
    server.scheme = "az"
    for name in server.secret_names:
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        if name not in server.secret_names:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=2023-11-03&sp=r&sig=given")
    server.given = "given"
    with ndcache.load("az://bucket/a model/ü/") as weights:
        assert_same(weights, arrays)
    assert {request.target.partition("?")[2] for request in server.requests} == {"sv=2023-11-03&sp=r&sig=given"}


@every_storage
def test_row_100_no_secret_is_shown_or_kept(
    bucket: Bucket, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, _ = bucket
    server.cut[server.path(f"bucket/{FOLDER[server.scheme]}/params_shard_1.bin")] = 40_000
    with caplog.at_level(logging.DEBUG, "ndcache"):
        with pytest.raises(ndcache.TransferError) as broken:
            ndcache.load(source(server), retries=0, trace=tmp_path / "trace.json")
        server.expired = lambda signature: True
        with pytest.raises(ndcache.AuthError) as refused:
            ndcache.load(source(server), cache_dir=tmp_path / "other")
    shown = caplog.text + "".join(everything(each.value) + str(pickle.dumps(each.value)) for each in (broken, refused))
    files = [tmp_path / "trace.json", *filter(Path.is_file, cache_dir.rglob("*"))]
    shown += "\n".join(path.read_text("latin-1") for path in files)
    for secret in (SECRET, AZURE_KEY, ACCESS_KEY, service_account()["private_key"][40:80], *server.signatures):
        assert secret not in shown


@pytest.mark.parametrize("text", [SECRET, "http://127.0.0.1:9/?Token={}", "400: <Error>{}</Error>", "no\n\nDebug: {}"])
def test_row_100_a_secret_in_an_error_of_obstore_is_not_shown(
    text: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = bucket

    def sign(*_: object) -> str:
        raise obstore.exceptions.GenericError(f"it failed: {text.format('session-' + SECRET[::-1])}")

    monkeypatch.setattr(obstore, "sign", sign)
    with pytest.raises(ndcache.AuthError, match=r"can be signed: (it failed|GenericError)") as caught:
        ndcache.load(source(server))
    for secret in (SECRET, SECRET[::-1]):
        assert secret not in everything(caught.value)


def test_row_101_without_obstore_the_error_says_how_to_install_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = bucket
    ndcache.fetch(source(server))
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ndcache.ConnectError, match="pip install obstore"):
        ndcache.load("s3://bucket/another/")
    with ndcache.load(source(server), offline=True) as weights:
        assert len(weights) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket; write s3://bucket/folder/"),
        ("gs:///key", "names no bucket; write gs://bucket/folder/"),
        ("s3://buck et/key", "cannot be a bucket's name"),
        ("s3://bucket/key?versionId=1", "has a query"),
        ("az://user:hunter2@container/key", "credentials come from the environment"),
        ("s3://bucket/a//b", "an empty part"),
        ("gcs://bucket/key", "write gs://"),
    ],
)
def test_row_102_a_url_that_names_no_object_is_a_value_error(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ndcache.load(url)
    assert "hunter2" not in str(caught.value)


def test_the_region_that_s3_names_is_used(bucket: Bucket) -> None:
    server, arrays = bucket
    server.region = "ap-east-1"
    with ndcache.load(source(server), files=False) as weights:
        assert_same(weights, arrays)
    assert server.refused == ["AuthorizationHeaderMalformed"], "the region is learned once"


def test_row_97_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:
    server, _ = bucket
    server.code = "NoSuchBucket"
    with pytest.raises(ndcache.NotFoundError) as caught:
        ndcache.load("s3://bukcet/model/")
    assert "there is no s3://bukcet (NoSuchBucket, status 404)" in everything(caught.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_row_103_a_forked_process_signs_with_a_key_and_does_not_wait_forever(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = bucket
    ObjectStorage().get(f"{source(server)}x", lambda address: None, Cancellation())
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing"
        try:
            ObjectStorage().get(f"{source(server)}x", lambda address: None, Cancellation())
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere")
            ObjectStorage().get(f"{source(server)}x", lambda address: None, Cancellation())
        except ndcache.AuthError as error:
            said = str(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        assert "cannot be used after a fork" in pipe.read()
    os.waitpid(child, 0)


def test_tvm_and_single_files_take_buckets(bucket: Bucket) -> None:
    server, arrays = bucket
    with tvm.ArtifactCache() as cache:
        data = cache.fetch_with_cache(f"{source(server)}params_shard_2.bin")
    assert data == arrays["layer.2"].tobytes()


def test_a_mirror_may_be_in_a_bucket(bucket: Bucket, serve: Callable[..., Any], tmp_path: Path) -> None:
    server, arrays = bucket
    origin = serve(tmp_path / "www/bucket/a model/ü")
    origin.status = {f"/params_shard_{n}.bin": 404 for n in range(4)}
    with ndcache.load(origin.url, mirrors=[source(server)], files=False) as weights:
        assert_same(weights, arrays)
    assert len(server.signatures) == 4


@pytest.mark.once
def test_s3rver_gives_safetensors_files_with_what_lies_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket
) -> None:
    arrays = {name: np.full(1000, ord(name), np.float32) for name in "abcdef"}
    written = {*write_files(tmp_path / "st", arrays, 3), "model.safetensors.index.json"}
    texts = {"config.json", "vocab.txt", "spiece.model", "chat_template.jinja"}
    for name in (*texts, "model.py", "README.md"):
        (tmp_path / "st" / name).write_text(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
    with s3rver(tmp_path / "s3rver") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = obstore.store.S3Store("models", client_options={"allow_http": True})
        for path in (tmp_path / "st").iterdir():
            obstore.put(store, f"team/{path.name}", path)
        with ndcache.load("s3://models/team/") as weights:
            assert_same(weights, arrays)
            assert set(weights.stats.files) == texts
        directory = ndcache.fetch("s3://models/team/", include=["*.md"], local_dir=tmp_path / "mine")
        names = {path.name for path in directory.iterdir() if path.is_file()}
        assert names == {*written, *texts, "README.md"}
        assert all((directory / name).read_bytes() == (tmp_path / "st" / name).read_bytes() for name in names)


@pytest.mark.once
def test_s3rver_gives_a_model_and_refuses_what_has_expired(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arrays = bucket
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
    with s3rver(tmp_path / "s3rver") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = obstore.store.S3Store("models", client_options={"allow_http": True})
        for path in (tmp_path / "www/bucket/a model/ü").iterdir():
            obstore.put(store, f"team/ü model/{path.name}", path)
        with ndcache.load("s3://models/team/ü model/") as weights:
            assert_same(weights, arrays)
        assert sorted(ObjectStorage().list("s3://models/team/ü model/", Cancellation())) == sorted(
            path.name for path in (tmp_path / "www/bucket/a model/ü").iterdir()
        )
        with pytest.raises(ndcache.NotFoundError):
            ndcache.load("s3://models/team/")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ANOTHER")
        with pytest.raises(ndcache.AuthError, match="InvalidAccessKeyId"):
            ndcache.load("s3://models/team/ü model/", cache_dir=tmp_path / "other")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
        monkeypatch.setattr(storage, "_VALID", timedelta(0))
        with pytest.raises(ndcache.AuthError, match="expired"):
            ndcache.load("s3://models/team/ü model/", cache_dir=tmp_path / "other")
