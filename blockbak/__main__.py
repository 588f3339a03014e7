"""``blockbak``, and ``python -m blockbak``."""

import os
import signal
from types import FrameType
from typing import NoReturn


def _too_early(_: int, __: FrameType | None) -> NoReturn:
    os.write(2, b"blockbak: Interrupted; nothing was begun.\n")
    os._exit(130)


def main() -> NoReturn:
    """Run the command. A signal that comes while it is still being loaded ends it at once, with the status of
    one that was interrupted.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup SIGHUP stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _too_early)
    from blockbak.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
