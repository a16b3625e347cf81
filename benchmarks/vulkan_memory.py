"""Time the allocation of GPU memory by the driver itself, which any loader that uses wgpu has to wait for.

Run it as ``python benchmarks/vulkan_memory.py``; it needs the package ``vulkan`` (``pip install vulkan``) and a GPU
with memory of its own. It allocates 4 GiB in blocks of 256 MiB: as wgpu does, which puts many buffers into each block;
with each block dedicated to one buffer, which wgpu never requests; as wgpu does while threads write to mapped memory of
the GPU, as a load must; and with CUDA, through torch.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MIB = 1 << 20
BLOCK, BLOCKS, ROUNDS = 256 * MIB, 16, 5
_DEVICE_LOCAL, _HOST_VISIBLE = 1, 2
_STORAGE_AND_COPIES = 0x20 | 1 | 2


class Vulkan:
    """A device on the first discrete GPU, and the GPU's types of memory."""

    def __init__(self) -> None:
        import vulkan as vk

        self.vk = vk
        application = vk.VkApplicationInfo(apiVersion=vk.VK_MAKE_VERSION(1, 1, 0))
        instance = vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=application), None)
        found = vk.vkEnumeratePhysicalDevices(instance)
        discrete = vk.VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU
        physical = next((each for each in found if self._properties(each).deviceType == discrete), None)
        if physical is None:
            raise SystemExit("no GPU with memory of its own")
        self.name = self._properties(physical).deviceName
        queue = vk.VkDeviceQueueCreateInfo(queueFamilyIndex=0, queueCount=1, pQueuePriorities=[1.0])
        info = vk.VkDeviceCreateInfo(queueCreateInfoCount=1, pQueueCreateInfos=[queue])
        self.device = vk.vkCreateDevice(physical, info, None)
        memory = vk.vkGetPhysicalDeviceMemoryProperties(physical)
        flags = [memory.memoryTypes[index].propertyFlags for index in range(memory.memoryTypeCount)]
        both = _DEVICE_LOCAL | _HOST_VISIBLE
        self.plain = next(index for index, flag in enumerate(flags) if flag & both == _DEVICE_LOCAL)
        self.mapped = next((index for index, flag in enumerate(flags) if flag & both == both), None)

    def allocate(self, kind: int, dedicated_to: Any = None) -> Any:
        """Allocate a block, perhaps for one buffer alone."""
        vk = self.vk
        more = None if dedicated_to is None else vk.VkMemoryDedicatedAllocateInfo(buffer=dedicated_to)
        info = vk.VkMemoryAllocateInfo(pNext=more, allocationSize=BLOCK, memoryTypeIndex=kind)
        return vk.vkAllocateMemory(self.device, info, None)

    def blocks(self) -> Callable[[], None]:
        """Allocate as wgpu does; return a function that frees it all."""
        made = [self.allocate(self.plain) for _ in range(BLOCKS)]

        def free() -> None:
            for memory in made:
                self.vk.vkFreeMemory(self.device, memory, None)

        return free

    def dedicated(self) -> Callable[[], None]:
        """Allocate each block for one buffer, and bind it, as drivers may do the work only then."""
        vk, made = self.vk, []
        for _ in range(BLOCKS):
            buffer = vk.vkCreateBuffer(
                self.device, vk.VkBufferCreateInfo(size=BLOCK, usage=_STORAGE_AND_COPIES, sharingMode=0), None
            )
            memory = self.allocate(self.plain, buffer)
            vk.vkBindBufferMemory(self.device, buffer, memory, 0)
            made.append((buffer, memory))

        def free() -> None:
            for buffer, memory in made:
                vk.vkDestroyBuffer(self.device, buffer, None)
                vk.vkFreeMemory(self.device, memory, None)

        return free

    def writers(self, count: int) -> tuple[Callable[[], float], Callable[[], None]]:
        """Start threads that write to the GPU's mapped memory; return functions that count the bytes and end them."""
        assert self.mapped is not None
        block = self.allocate(self.mapped)
        view = self.vk.vkMapMemory(self.device, block, 0, BLOCK, 0)
        target = np.frombuffer(view, np.uint8)
        source, done, stop = np.ones(BLOCK // count, np.uint8), [0] * count, threading.Event()

        def write(number: int) -> None:
            part = target[number * len(source) : (number + 1) * len(source)]
            while not stop.is_set():
                part[:] = source
                done[number] += len(source)

        threads = [threading.Thread(target=write, args=[number]) for number in range(count)]
        for thread in threads:
            thread.start()

        def end() -> None:
            stop.set()
            for thread in threads:
                thread.join()
            self.vk.vkUnmapMemory(self.device, block)
            self.vk.vkFreeMemory(self.device, block, None)

        return lambda: float(sum(done)), end

    def _properties(self, physical: Any) -> Any:
        return self.vk.vkGetPhysicalDeviceProperties(physical)


def allocate_with_cuda() -> Callable[[], None]:
    """Allocate with cudaMalloc; return a function that frees it all."""
    import torch

    made = [torch.empty(BLOCK, dtype=torch.uint8, device="cuda") for _ in range(BLOCKS)]

    def free() -> None:
        made.clear()
        torch.cuda.empty_cache()

    return free


def measure(label: str, allocate: Callable[[], Callable[[], None]]) -> None:
    """Print how long allocating and freeing take."""
    made, freed = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        free = allocate()
        made.append(time.perf_counter() - start)
        start = time.perf_counter()
        free()
        freed.append(time.perf_counter() - start)
    seconds = statistics.median(made)
    print(
        f"{label:44} {1e3 * seconds:6.1f} ms ({1e3 * min(made):.1f} to {1e3 * max(made):.1f}), "
        f"{BLOCK * BLOCKS / 1e9 / seconds:6.1f} GB/s; freed in {1e3 * statistics.median(freed):.1f} ms",
        flush=True,
    )


def main() -> None:
    vulkan = Vulkan()
    print(f"{vulkan.name}: {BLOCKS} blocks of {BLOCK // MIB} MiB, medians of {ROUNDS}")
    measure("as wgpu does", vulkan.blocks)
    measure("each dedicated to a buffer", vulkan.dedicated)
    if vulkan.mapped is not None:
        for count in (1, 4, 8):
            written, end = vulkan.writers(count)
            start, before = time.perf_counter(), written()
            measure(f"as wgpu does, beside {count} writing threads", vulkan.blocks)
            speed = (written() - before) / (time.perf_counter() - start) / 1e9
            end()
            print(f"    meanwhile {speed:.1f} GB/s were written", flush=True)
    try:
        allocate_with_cuda()()
    except Exception as error:  # no torch, or no CUDA
        print(f"CUDA: skipped: {error}")
    else:
        measure("cudaMalloc", allocate_with_cuda)


if __name__ == "__main__":
    main()
