"""``blockbak``, and ``python -m blockbak``."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Until it is loaded, Ctrl-C just ends the process: nothing was begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blockbak.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
