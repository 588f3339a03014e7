"""``python -m blockbak`` is the same as ``blockbak``."""

from blockbak.cli.main import main

main()
