"""Tells people: by a command of theirs, or through apprise. Whatever becomes of it is a sentence, never an error.

As a program (``python -m blockbak.host.notifier``) it hands one message to apprise: in a process of its own, so that
an address that hangs or a plugin that crashes is ended at its deadline.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from blockbak.errors import BlockbakError, CommandFailed, Interrupted, UnsafeHook
from blockbak.host import runner
from blockbak.host.hooks import unsafe, way_to
from blockbak.model.telling import Event

COMMAND_SECONDS = 60.0
URLS_SECONDS = 120.0


def by_command(argv: Sequence[str], event: Event, check: Callable[[], None], seconds: float = COMMAND_SECONDS) -> str:
    """Run the command with the event in its environment and on standard input; why it failed, or "". ``check`` may
    raise Interrupted.

    It is run as root, so nobody else may be able to exchange it.
    """
    if reason := unusable(argv):
        return reason
    text = json.dumps(event.document()).encode() + b"\n"
    try:
        runner.run(argv, deadline=seconds, input=text, env=event.environment(), check=check)
    except Interrupted:
        raise
    except BlockbakError as error:
        return str(error)
    return ""


def unusable(argv: Sequence[str]) -> str:
    """Why a command would not be run, or ""."""
    try:
        reason = unsafe(way_to(argv[0]))
    except OSError as error:
        return f"{argv[0]} cannot be looked at: {error.strerror}."
    return str(UnsafeHook(path=argv[0], reason=reason)) if reason else ""


def has_apprise() -> bool:
    """Whether the extra is installed."""
    return find_spec("apprise") is not None


def by_urls(urls: Sequence[str], event: Event, check: Callable[[], None], seconds: float = URLS_SECONDS) -> str:
    """Send it to every address; why that failed, or "". The addresses hold secrets, so nothing repeats them."""
    if not has_apprise():
        return "Nobody was told by mail or web: the extra blockbak[notify] (apprise) is not installed."
    message = {"urls": list(urls), "title": event.subject, "body": event.text, "kind": event.kind}
    try:
        failed = _handed_over(message, check, seconds)
    except CommandFailed as error:
        return f"Nobody was told by mail or web: {error.fields['status']}."
    except Interrupted:
        raise
    except BlockbakError as error:
        return str(error)
    return f"Nobody was told by {', '.join(failed)}: it could not be sent." if failed else ""


def not_understood(urls: Sequence[str]) -> str:
    """Why some of the addresses can never be used, or "". Nothing is sent."""
    try:
        failed = _handed_over({"urls": list(urls), "title": ""}, lambda: None, URLS_SECONDS)
    except BlockbakError as error:
        return str(error)
    return f"apprise does not understand the address {', '.join(f'{one}://…' for one in failed)}" if failed else ""


def _handed_over(message: Mapping[str, object], check: Callable[[], None], seconds: float) -> list[str]:
    """What ``main`` prints of a message. Raises CommandFailed, Interrupted."""
    argv = [sys.executable, "-I", "-m", "blockbak.host.notifier"]
    done = runner.run(argv, deadline=seconds, input=json.dumps(message).encode(), accept=(0, 1), check=check)
    failed = done.stdout.split()
    if done.status and not failed:
        raise CommandFailed(program="apprise", status="it broke down", stderr=done.stderr)
    return failed


def main() -> int:
    """Send the message on standard input; the kinds of address that failed are printed, exit status 1 then. One
    without a title is not sent: only the addresses are looked at.
    """
    from apprise import Apprise, NotifyType

    message = json.load(sys.stdin)
    # Its log repeats addresses, and with them their secrets.
    logging.disable(logging.CRITICAL)
    kind = NotifyType.SUCCESS if message.get("kind") == "recovery" else NotifyType.FAILURE
    failed = []
    for url in message["urls"]:
        sent = False
        sender = Apprise()
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            sent = sender.add(url) and (
                not message["title"]
                or bool(sender.notify(body=message["body"], title=message["title"], notify_type=kind))
            )
        if not sent:
            failed.append(url.partition("://")[0])
    sys.stdout.write("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
