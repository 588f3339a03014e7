"""blockbak: images of block devices, hot and cold, incremental and restorable without it."""

__version__ = "0.1.0"
