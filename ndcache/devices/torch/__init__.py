"""Devices of PyTorch, with tensors that are `torch.Tensor`: CUDA, the CPU, and others through the CPU."""
