"""Load a model onto the GPU and run a WGSL compute pass over one of its buffers."""

from __future__ import annotations

import tempfile

import numpy as np
import wgpu

import ndcache

SHADER = """
@group(0) @binding(0) var<storage, read> weight: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < arrayLength(&result)) {
        result[id.x] = max(weight[id.x], 0.0);
    }
}
"""


def relu(tensor: ndcache.GPUTensor) -> np.ndarray:
    device = tensor.device
    result = device.create_buffer(size=tensor.nbytes, usage=wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC)
    pipeline = device.create_compute_pipeline(
        layout="auto",
        compute={"module": device.create_shader_module(code=SHADER), "entry_point": "main"},
    )
    bindings = [
        {"binding": 0, "resource": {"buffer": tensor.buffer, "offset": 0, "size": tensor.nbytes}},
        {"binding": 1, "resource": {"buffer": result, "offset": 0, "size": tensor.nbytes}},
    ]
    group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=bindings)
    encoder = device.create_command_encoder()
    compute = encoder.begin_compute_pass()
    compute.set_pipeline(pipeline)
    compute.set_bind_group(0, group)
    compute.dispatch_workgroups(-(-tensor.nbytes // 4 // 64))
    compute.end()
    device.queue.submit([encoder.finish()])
    return np.frombuffer(device.queue.read_buffer(result), np.float32).reshape(tensor.shape)


if __name__ == "__main__":
    weight = np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        ndcache.dump({"weight": weight}, directory, encode="raw")
        with ndcache.load(directory, device="gpu") as weights:
            print(weights)
            np.testing.assert_array_equal(relu(weights["weight"]), np.maximum(weight, 0))
            print("the GPU and NumPy agree")
