"""One file a verb; render.py is the only module that prints."""
