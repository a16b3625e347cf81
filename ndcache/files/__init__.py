"""Files of this system: folders, descriptors, notes and mapped pages."""
