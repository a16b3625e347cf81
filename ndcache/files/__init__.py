"""Files on this machine: folders, file descriptors, notes and mapped pages."""
