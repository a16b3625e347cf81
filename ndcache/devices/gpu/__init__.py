"""A GPU through wgpu."""
