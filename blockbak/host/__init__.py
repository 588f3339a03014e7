"""The only room that touches kernel, processes, udev and mounts."""
