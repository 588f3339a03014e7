"""What mount(8) is told, so that a mount comes back as mountinfo showed it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ONLY_SHOWN = frozenset({"seclabel"})
"""Shown by the kernel, and taken by no mount."""
_ONLY_SHOWN_BY_FUSE = ("user_id=", "group_id=", "blksize=", "default_permissions")
"""Made by the program that serves it (fs/fuse/inode.c, fuse_show_options)."""
_OF_LIBMOUNT = ("loop", "loop=", "offset=", "sizelimit=")
"""Noted by ``mount -o loop``: the loop device is there by then, and is mounted as any other."""


def parts(options: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A mount's own options and its file system's, out of both in a row: each begins with ``rw`` or ``ro``
    (kernel, proc_namespace.c, show_mountinfo).
    """
    second = next((at for at, one in enumerate(options) if at and one in ("rw", "ro")), len(options))
    return tuple(options[:second]), tuple(options[second:])


def to_mount(fstype: str, options: Sequence[str], userspace: Iterable[str] = ()) -> tuple[str, ...]:
    """The options of a new mount of a file system. Where only the mount is read-only, ``to_bind`` comes after it."""
    own, of_filesystem = parts(options)
    flags = [one for one in (*own, *_access_times(own)) if one not in ("rw", "ro")]
    shown = [one for one in of_filesystem if one not in _ONLY_SHOWN]
    if fstype.startswith("fuse"):
        shown = [one for one in shown if not one.startswith(_ONLY_SHOWN_BY_FUSE)]
    if any(one.startswith("subvolid=") for one in shown):
        # It is enough, and a name with a comma could not be told.
        shown = [one for one in shown if not one.startswith("subvol=")]
    kept = [one for one in userspace if one != "loop" and not one.startswith(_OF_LIBMOUNT[1:])]
    return tuple(dict.fromkeys([*(shown or own[:1]), *flags, *kept]))


def to_bind(options: Sequence[str]) -> tuple[str, ...]:
    """The options that make a mount's own flags exactly these."""
    own = parts(options)[0]
    return ("remount", "bind", *own, *_access_times(own))


def _access_times(own: Sequence[str]) -> tuple[str, ...]:
    """What the kernel shows by showing nothing (proc_namespace.c, show_mnt_opts)."""
    return () if {"relatime", "noatime"} & set(own) else ("strictatime",)


def differences(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """What a mount's options lack and have more, in words; both are in a row, as mountinfo has them."""
    said = []
    for what, old, new in zip(("", "file system "), parts(before), parts(after), strict=True):
        lost, more = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        said += [f"{what}{one} before, not now" for one in lost]
        said += [f"{what}{one} now, not before" for one in more]
    return said


def kinds(propagation: str) -> tuple[str, ...]:
    """How a mount propagates, out of mountinfo's optional fields: ``shared``, ``slave``, ``unbindable``, else
    ``private``; in the order in which mount(8) is told.
    """
    fields = propagation.split()
    if "unbindable" in fields:
        return ("unbindable",)
    found = ["slave"] if any(one.startswith("master:") for one in fields) else []
    found += ["shared"] if any(one.startswith("shared:") for one in fields) else []
    return tuple(found) or ("private",)


def shows_all(fstype: str, root: str, options: Sequence[str]) -> bool:
    """Whether a mount with this root is an ordinary one, and no bind of a directory: a btrfs subvolume names itself
    in the options.
    """
    subvolume = next((one.partition("=")[2] for one in options if one.startswith("subvol=")), "")
    return root == (subvolume if fstype == "btrfs" and subvolume else "/")
