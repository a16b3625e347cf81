"""safetensors files: each is a shard whose records are in its own header."""
