"""Write a model to other formats: safetensors, .npz, and NDArray caches."""
