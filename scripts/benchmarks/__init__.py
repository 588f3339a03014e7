"""What ``scripts/bench`` runs: blockbak and its peers, side by side on one device.

``place`` makes and removes devices and mounts, ``work`` fills them, ``measure`` times whole processes,
``contests`` says who does what, ``goals`` judges, ``report`` prints. Nothing here imports numpy: a
child's peak of memory counts from the size of the process that started it.
"""
