"""Expand bfloat16 to float32 on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wgpu

__all__ = ["Expander"]

_WORKGROUP_SIZE = 256
#: A bfloat16 is the upper half of a float32, so the shader moves bits and rounds nothing. A word holds two bfloat16.
_SHADER = f"""
@group(0) @binding(0) var<storage, read> stored: array<u32>;
@group(0) @binding(1) var<storage, read_write> expanded: array<vec2<u32>>;

@compute @workgroup_size({_WORKGROUP_SIZE})
fn expand(@builtin(global_invocation_id) id: vec3<u32>) {{
    if (id.x < arrayLength(&stored)) {{
        let word = stored[id.x];
        expanded[id.x] = vec2<u32>(word << 16u, word & 0xffff0000u);
    }}
}}
"""


class Expander:
    """A compute pipeline that expands bfloat16, and its buffers, which all submissions share.

    Parameters
    ----------
    device : wgpu.GPUDevice
    nbytes : int
        The most stored bytes that are expanded at once; see `max_bytes`.

    Attributes
    ----------
    expanded : wgpu.GPUBuffer
        Receives the float32 values.
    """

    def __init__(self, device: wgpu.GPUDevice, nbytes: int) -> None:
        import wgpu

        module = device.create_shader_module(code=_SHADER)
        self._pipeline = device.create_compute_pipeline(
            layout="auto", compute={"module": module, "entry_point": "expand"}
        )
        usage = wgpu.BufferUsage
        self._stored = device.create_buffer(size=nbytes, usage=usage.STORAGE | usage.COPY_DST)
        self.expanded = device.create_buffer(size=2 * nbytes, usage=usage.STORAGE | usage.COPY_SRC)
        self._group = device.create_bind_group(
            layout=self._pipeline.get_bind_group_layout(0),
            entries=[
                {"binding": binding, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
                for binding, buffer in enumerate((self._stored, self.expanded))
            ],
        )

    @staticmethod
    def max_bytes(device: wgpu.GPUDevice) -> int:
        """Return the most stored bytes that an expander of this device can expand at once."""
        limits = device.limits
        buffer_bytes = min(limits["max-storage-buffer-binding-size"], limits["max-buffer-size"]) // 2
        dispatch_bytes = limits["max-compute-workgroups-per-dimension"] * _WORKGROUP_SIZE * 4
        return int(min(buffer_bytes, dispatch_bytes)) & ~7

    def encode(self, encoder: wgpu.GPUCommandEncoder, source: wgpu.GPUBuffer, start: int, end: int) -> None:
        """Record commands that expand bytes `start` to `end` of `source`, multiples of 4, into `expanded`."""
        encoder.copy_buffer_to_buffer(source, start, self._stored, 0, end - start)
        compute = encoder.begin_compute_pass()
        compute.set_pipeline(self._pipeline)
        compute.set_bind_group(0, self._group)
        compute.dispatch_workgroups(-(-(end - start) // (4 * _WORKGROUP_SIZE)))
        compute.end()

    def destroy(self) -> None:
        """Free the buffers."""
        self._stored.destroy()
        self.expanded.destroy()
