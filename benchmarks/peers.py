"""The contenders. ``python -m benchmarks.peers NAME JSON`` runs one in this process and prints what it took as JSON.

Time starts when modules are imported and, on a GPU, the device is open; it ends when the bytes are where they belong.
Each gives the number of bytes that it loaded or wrote, which the harness compares.
"""

import json
import os
import sys
import time

# Nothing more is imported here: `import_ndcache` measures what imports cost.


class Unavailable(Exception):
    """Something that the contender needs is not on this machine."""


def need(name):
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:  # some fail with RuntimeError or OSError without a driver
        raise Unavailable(f"{name}: {error}") from error


#: Of the work that was timed: seconds of CPU, those of processes that it started included, and stages if it has any.
profile = {}


#: What was loaded, so that freeing it is in nobody's time.
alive = []
#: Bytes of memory that are to be there before time starts.
memory = {"bytes": 0}
TOUCH = """
import mmap, sys
# Private, as the memory of arrays is: that of shared maps comes in other pages, and leaves free memory as it was.
private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
with mmap.mmap(-1, int(sys.argv[1]), **private) as fresh:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        fresh.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, len(fresh), 4096):
        fresh[start] = 1
"""


def have_memory(nbytes):
    """Have another process use that much memory, and end.

    A virtual machine may give what has been free for a second or so back to its host. To get 2 GiB of it again can take
    4 s instead of 0.2 s, whoever asks: contenders are compared, not how long memory was free before each.
    """
    import subprocess

    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        nbytes = min(nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2)
    subprocess.run([sys.executable, "-S", "-c", TOUCH, str(nbytes)], check=False)


def timed(work):
    if memory["bytes"] > 1 << 20:
        have_memory(memory["bytes"])
    before, start = os.times(), time.perf_counter()
    nbytes = work()
    seconds, after = time.perf_counter() - start, os.times()
    profile["user"] = after.user + after.children_user - before.user - before.children_user
    profile["system"] = after.system + after.children_system - before.system - before.children_system
    return seconds, nbytes


# --- ndcache


def ndcache_load(given):
    """A whole `ndcache.load`; from a URL into an empty cache it checks md5 and syncs each file to disk."""
    import ndcache.sources.download
    from ndcache import load

    if given.get("no_ranges"):
        if not hasattr(ndcache.sources.download, "RANGE_THRESHOLD"):
            raise Unavailable("this ndcache has no byte ranges for large shards")
        ndcache.sources.download.RANGE_THRESHOLD = 1 << 62
    device = open_gpu() if given.get("gpu") else "cpu"
    options = {"cache_dir": given["out"], "max_workers": given.get("workers", 8)}

    def work():
        weights = load(given.get("url") or given["directory"], device, **options)
        alive.append(weights)
        profile["stages"] = {name: seconds for name, seconds in weights.stats.seconds.items() if seconds >= 0.001}
        return sum(tensor.nbytes for tensor in weights.values())

    return timed(work)


def ndcache_fetch(given):
    """`ndcache.fetch`: md5 and fsync, no decoding."""
    from ndcache import fetch

    def work():
        fetch(given["url"], cache_dir=given["out"], max_workers=given.get("workers", 8))
        return written(given)

    return timed(work)


def ndcache_stream(given):
    """`ndcache.stream` of a local directory, nothing kept."""
    from ndcache import stream

    return timed(lambda: sum(array.nbytes for _, array in stream(given["directory"])))


def import_ndcache(given):
    def work():
        import ndcache  # noqa: F401

    return timed(work)[0], given["expect"]


def import_ndcache_load(given):
    def work():
        from ndcache import load  # noqa: F401

    return timed(work)[0], given["expect"]


def import_requests_numpy(given):
    def work():
        import numpy  # noqa: F401
        import requests  # noqa: F401

    return timed(work)[0], given["expect"]


def empty_gpu(given):
    """Nothing but ndcache imported and a device opened: what memory that takes."""
    from ndcache import load  # noqa: F401

    return timed(open_gpu)[0], given["expect"]


# --- what cannot be left out, alone


def md5_alone(given):
    """The digests of all files, by 8 threads."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    def one(name):
        with open(f"{given['directory']}/{name}", "rb") as file:
            digest = hashlib.md5()
            while data := file.read(1 << 18):
                digest.update(data)
            return digest.hexdigest()

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, given["shards"]))
        return given["expect"]

    return timed(work)


def expand_alone(given):
    """bfloat16 in memory → float32 in memory that is there already, by 8 threads: no files, no pages to be made."""
    from concurrent.futures import ThreadPoolExecutor

    import ml_dtypes
    import numpy

    count, parts = given["expect"] // 4, 64
    source = numpy.ones(count, ml_dtypes.bfloat16)
    target = numpy.ones(count, numpy.float32)

    def one(index):
        part = slice(count * index // parts, count * (index + 1) // parts)
        target[part] = source[part]

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(parts)))
        return target.nbytes

    return timed(work)


def pages_alone(given):
    """The expanded weights' memory, asked for and touched by 8 threads, and nothing put into it."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy

    parts = 64

    def one(index):
        return numpy.full(given["expect"] // parts, 0, numpy.uint8)

    def work():
        with ThreadPoolExecutor(8) as pool:
            alive.extend(pool.map(one, range(parts)))
        return sum(array.nbytes for array in alive)

    return timed(work)


# --- downloaders; none of these compares a digest or syncs a file, but huggingface_hub and aria2c check sizes


def hf_transfer(given):
    """Eight shards at a time, one connection each, pieces of 10 MiB; four other ways were as fast, within noise."""
    from concurrent.futures import ThreadPoolExecutor

    module = need("hf_transfer")

    def one(name):
        module.download(given["url"] + name, f"{given['out']}/{name}", 1, 10 << 20)

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, given["shards"]))
        return written(given)

    return timed(work)


def huggingface_hub(given):
    """`hf_hub_download` of each shard by 8 threads from an endpoint on loopback."""
    from concurrent.futures import ThreadPoolExecutor

    hub = need("huggingface_hub")
    need("huggingface_hub.utils").disable_progress_bars()

    def one(name):
        hub.hf_hub_download("bench/model", name, endpoint=given["url"].rstrip("/"), cache_dir=given["out"])

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, given["shards"]))
        return written(given)

    return timed(work)


def curl(given):
    """``curl --parallel --parallel-max 8``."""
    options = ["--cacert", given["ca"]] if given.get("ca") else []
    command = ["curl", "-sSf", "--parallel", "--parallel-immediate", "--parallel-max", "8", *options]
    for name in given["shards"]:
        command += ["-o", f"{given['out']}/{name}", given["url"] + name]
    return program(given, command)


def aria2c(given):
    """``aria2c -j4 -x4``: four shards at a time, four connections for each."""
    lines = "".join(f"{given['url']}{name}\n out={name}\n" for name in given["shards"])
    options = [f"--ca-certificate={given['ca']}"] if given.get("ca") else []
    command = ["aria2c", "-q", "-j4", "-x4", "-s4", "--file-allocation=none", "-d", given["out"], "-i", "-", *options]
    return program(given, command, lines)


def quarters(given):
    """TVM's web runtime: the list of shards in four fixed quarters, each fetched in order by one thread (requests)."""
    import threading

    import requests

    def quarter(names):
        with requests.Session() as session:
            for name in names:
                with session.get(given["url"] + name, stream=True, verify=given.get("ca") or True) as answer:
                    answer.raise_for_status()
                    with open(f"{given['out']}/{name}", "wb") as file:
                        for piece in answer.iter_content(1 << 20):
                            file.write(piece)

    def work():
        shards = given["shards"]
        bounds = [len(shards) * index // 4 for index in range(5)]
        threads = [threading.Thread(target=quarter, args=(shards[bounds[i] : bounds[i + 1]],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return written(given)

    return timed(work)


# --- loaders


def seed(given):
    """The seed's algorithm: shards in turn (requests or a file), NumPy decode, write_buffer and wait per record."""
    import numpy as np
    import requests

    device = open_gpu() if given.get("gpu") else None
    with open(f"{given['directory']}/tensor-cache.json") as file:
        manifest = json.load(file)

    def shard(name):
        if given.get("url"):
            return requests.get(given["url"] + name, timeout=60).content
        with open(f"{given['directory']}/{name}", "rb") as file:
            return file.read()

    def decode(data, record):
        raw = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
        if record["format"] == "f32-to-bf16" and record["dtype"] == "float32":
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(raw, np.uint8)

    def work():
        for entry in manifest["records"]:
            data = shard(entry["dataPath"])
            for record in entry["records"]:
                array = decode(data, record)
                if device is None:
                    alive.append(array)
                    continue
                buffer = device.create_buffer(size=array.nbytes, usage=0x8C)  # STORAGE | COPY_SRC | COPY_DST
                device.queue.write_buffer(buffer, 0, array)
                device.queue.read_buffer(buffer, 0, 4)
                alive.append(buffer)
        return sum(item.nbytes if device is None else item.size for item in alive)

    return timed(work)


def bare_loop(given):
    """create_buffer and write_buffer for each record of files in memory; one submit and one wait at the end."""
    import numpy as np

    device = open_gpu()
    with open(f"{given['directory']}/tensor-cache.json") as file:
        manifest = json.load(file)

    def work():
        for entry in manifest["records"]:
            data = np.fromfile(f"{given['directory']}/{entry['dataPath']}", np.uint8)
            for record in entry["records"]:
                buffer = device.create_buffer(size=record["nbytes"], usage=0x8C)
                device.queue.write_buffer(buffer, 0, data, record["byteOffset"], record["nbytes"])
                alive.append(buffer)
        device.queue.submit([])
        device.queue.read_buffer(alive[-1], 0, 4)
        return sum(buffer.size for buffer in alive)

    return timed(work)


def tvm_python(given):
    """``tvm.contrib.tvmjs.load_tensor_cache``."""
    tvm, tvmjs = need("tvm"), need("tvm.contrib.tvmjs")
    seconds, _ = timed(lambda: alive.append(tvmjs.load_tensor_cache(given["directory"], tvm.cpu())[0]))
    return seconds, sum(tensor.numpy().nbytes for tensor in alive[0].values())


def tvm_cpp(given):
    """``vm.builtin.tensor_cache.load``; it says nothing of bytes but by the tensors that are asked for afterwards."""
    tvm = need("tvm")
    load = tvm.get_global_func("vm.builtin.tensor_cache.load")
    get = tvm.get_global_func("vm.builtin.tensor_cache.get")
    seconds, _ = timed(lambda: load(given["directory"], tvm.cpu().dlpack_device_type(), 0))
    nbytes = 0
    for index in range(given["tensors"]):
        tensor = get(f"layers.{index}.weight")
        nbytes += int(tensor.shape[0]) * (4 if str(tensor.dtype) == "float32" else 2)
    return seconds, nbytes


def safetensors_numpy(given):
    """``safetensors.numpy.load_file``; bfloat16 stays as it is stored."""
    need("ml_dtypes")  # has NumPy know bfloat16
    module = need("safetensors.numpy")

    def work():
        alive.append(module.load_file(f"{given['directory']}/model.safetensors"))
        return sum(array.nbytes for array in alive[0].values())

    return timed(work)


def safetensors_cuda(given):
    """``safetensors.torch.load_file(device="cuda")``; bfloat16 stays as it is stored."""
    torch = cuda()
    module = need("safetensors.torch")

    def work():
        alive.append(module.load_file(f"{given['directory']}/model.safetensors", device="cuda:0"))
        torch.cuda.synchronize()
        return sum(tensor.nbytes for tensor in alive[0].values())

    return timed(work)


def runai(given):
    """Run:ai's streamer (16 threads by default), each tensor copied to the GPU as it comes."""
    torch = cuda()
    streamer_class = need("runai_model_streamer").SafetensorsStreamer

    def work():
        with streamer_class() as streamer:
            streamer.stream_file(f"{given['directory']}/model.safetensors")
            for _, tensor in streamer.get_tensors():
                alive.append(tensor.to("cuda:0", non_blocking=False))
        torch.cuda.synchronize()
        return sum(tensor.nbytes for tensor in alive)

    return timed(work)


def fastsafetensors(given):
    """Fastsafetensors without GPUDirect Storage."""
    torch = cuda()
    module = need("fastsafetensors")

    def work():
        loader = module.SafeTensorsFileLoader(None, torch.device("cuda:0"), nogds=True)
        loader.add_filenames({0: [f"{given['directory']}/model.safetensors"]})
        buffers = loader.copy_files_to_device()
        alive.append(buffers)
        nbytes = sum(buffers.get_tensor(name).nbytes for name in list(loader.get_keys()))
        torch.cuda.synchronize()
        return nbytes

    return timed(work)


def pinned_copy(given):
    """The limit: copies of 256 MiB from pinned memory to the GPU, as many as the model has bytes."""
    torch = cuda()
    piece = min(256 << 20, given["stored"])
    host = torch.empty(piece, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(piece, dtype=torch.uint8, device="cuda")
    there.copy_(host)
    torch.cuda.synchronize()
    count = max(1, given["stored"] // piece)

    def work():
        for _ in range(count):
            there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return count * piece

    seconds, nbytes = timed(work)
    return seconds * given["stored"] / nbytes, given["expect"]


# --- what they share


def open_gpu():
    """The device that ndcache itself would open, for whoever wants one."""
    from ndcache.devices.gpu import open_gpu as open_device
    from ndcache.errors import NoAdapterError

    try:
        return open_device("gpu").handle
    except NoAdapterError as error:
        raise Unavailable(str(error)) from error


def cuda():
    torch = need("torch")
    if not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA")
    torch.zeros(1).to("cuda")  # its first copy, as ndcache's device has its first submission behind it
    torch.cuda.synchronize()
    return torch


def program(given, command, text=None):
    import shutil
    import subprocess

    if shutil.which(command[0]) is None:
        raise Unavailable(f"{command[0]} is not installed")

    def work():
        subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.DEVNULL)
        return written(given)

    return timed(work)


def written(given):
    """Bytes of the shards that lie below the output directory, wherever they are."""
    import os

    names, found = set(given["shards"]), 0
    for folder, _, files in os.walk(given["out"]):
        found += sum(os.path.getsize(os.path.join(folder, name)) for name in files if name in names)
    return found


def peak_bytes():
    """The most memory this process had; not ru_maxrss, which begins with that of the parent."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def main():
    given = json.loads(sys.argv[2])
    memory["bytes"] = given.get("memory", 0)
    try:
        seconds, nbytes = globals()[sys.argv[1]](given)
    except Unavailable as error:
        print(json.dumps({"unavailable": str(error).splitlines()[0]}), flush=True)
        return
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "peak": peak_bytes(), "profile": profile}), flush=True)


if __name__ == "__main__":
    main()
