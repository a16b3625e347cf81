"""Load one quantised layer of an MLC model onto the GPU, and multiply with it there. NumPy checks the product.

Usage::

    python quantised_layer.py https://host/model/ model.layers.0.mlp.down_proj     # or hf://owner/name, or a directory
    python quantised_layer.py                                                      # a small one, which it writes first
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import wgpu

import ndcache

SHADER = Path(__file__).with_suffix(".wgsl").read_text("utf-8")


def dequantise(q_weight: np.ndarray, q_scale: np.ndarray) -> np.ndarray:
    # The layout is q4f16_1 of https://github.com/mlc-ai/mlc-llm: GroupQuantize with linear_weight_layout="NK" in
    # python/mlc_llm/quantization/group_quantization.py, and pack_weight in utils.py beside it.
    nibbles = (q_weight[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    groups = (nibbles.astype(np.float32) - 7).reshape(*q_scale.shape, 32)
    return (groups * q_scale[:, :, None]).reshape(len(q_scale), -1)


def multiply(q_weight: ndcache.GPUTensor, q_scale: ndcache.GPUTensor, inputs: np.ndarray) -> np.ndarray:
    device, rows, (count, columns) = q_weight.device, q_weight.shape[0], inputs.shape
    outputs = device.create_buffer(size=4 * count * rows, usage=wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC)
    given = device.create_buffer_with_data(data=inputs, usage=wgpu.BufferUsage.STORAGE)
    main = {"module": device.create_shader_module(code=SHADER), "constants": {"rows": rows, "columns": columns}}
    pipeline = device.create_compute_pipeline(layout="auto", compute=main)
    buffers = [q_weight.buffer, q_scale.buffer, given, outputs]
    entries = [{"binding": index, "resource": {"buffer": buffer}} for index, buffer in enumerate(buffers)]
    group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
    encoder = device.create_command_encoder()
    compute = encoder.begin_compute_pass()
    compute.set_pipeline(pipeline)
    compute.set_bind_group(0, group)
    compute.dispatch_workgroups(-(-rows // 64), count)
    compute.end()
    device.queue.submit([encoder.finish()])
    return np.frombuffer(device.queue.read_buffer(outputs), np.float32).reshape(count, rows)


def main(source: str, layer: str, columns: int | None = None) -> int:
    names = [f"{layer}.q_weight", f"{layer}.q_scale"]
    with ndcache.load(source, device="gpu", names=names) as on_gpu, ndcache.load(source, names=names) as on_cpu:
        print(on_gpu, *(f"{name}: {array.dtype} {array.shape}" for name, array in on_cpu.items()), sep="\n")
        weight = dequantise(on_cpu[names[0]], on_cpu[names[1]])[:, :columns].T.astype(np.float64)
        inputs = np.random.default_rng(0).standard_normal((3, len(weight)), np.float32)
        outputs = multiply(on_gpu[names[0]], on_gpu[names[1]], inputs)
    right = abs(outputs - inputs @ weight) <= 1e-5 * (abs(inputs) @ abs(weight))  # the GPU sums in float32
    print(f"{inputs.shape} times {weight.shape}: {right.sum()} of {right.size} products are those of NumPy")
    return 0 if right.all() else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
    rng = np.random.default_rng(1)
    q_weight, q_scale = rng.integers(0, 2**32, (301, 124), np.uint32), rng.standard_normal((301, 31), np.float32)
    with tempfile.TemporaryDirectory() as directory:
        ndcache.dump({"layer.q_weight": q_weight, "layer.q_scale": q_scale.astype(np.float16)}, directory)
        sys.exit(main(directory, "layer", columns=970))  # the last group has room for 22 more
