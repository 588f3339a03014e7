# Shared by the scripts beside it: sourced, never run. It leaves the shell in the checkout's
# root, with `checkout` naming it, and changes nothing else until one of its functions is called.
# shellcheck shell=bash

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$checkout"

# A root shell without login, and most non-root ones, lack these: mkfs and losetup live there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK=1

# A program that takes Ctrl-C for itself, as apt-get does, would else be all that ends.
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# The Debian package that brings a program.
package_of() {
    case $1 in
        mkfs.ext4 | mke2fs | debugfs) echo e2fsprogs ;;
        mkfs.xfs) echo xfsprogs ;;
        mkfs.btrfs) echo btrfs-progs ;;
        losetup | mount | umount | swapon) echo mount ;;
        mkfs.vfat) echo dosfstools ;;
        sfdisk) echo fdisk ;;
        sgdisk) echo gdisk ;;
        partx | mkswap | blkid | blkdiscard | unshare | nsenter | fsfreeze) echo util-linux ;;
        qemu-img) echo qemu-utils ;;
        udevadm) echo udev ;;
        systemctl) echo systemd ;;
        zstd) echo zstd ;;
        ddrescuelog) echo gddrescue ;;
        nbdkit) echo nbdkit ;;
        nbdfuse) echo libnbd-bin ;;
        fusermount3) echo fuse3 ;;
        lvcreate) echo lvm2 ;;
        partclone.ext4) echo partclone ;;
        mkfs.ntfs) echo ntfs-3g ;;
        mcopy) echo mtools ;;
        borg) echo borgbackup ;;
        restic) echo restic ;;
        qemu-system-x86_64) echo qemu-system-x86 ;;
        ssh | ssh-keygen) echo openssh-client ;;
        mkinitramfs) echo initramfs-tools-core ;;
        vagrant | mmdebstrap | rsync | cpio | busybox) echo "$1" ;;
        *) die "no package is known to bring '$1'" ;;
    esac
}

# quietly COMMAND...: installers talk a lot; what this one said is shown only if it fails.
quietly() {
    local log said status=0
    log=$(mktemp)
    # Open, and without a name: whatever ends this script, nothing is left of it.
    exec {said}<>"$log"
    rm -f "$log"
    "$@" >&"$said" 2>&1 </dev/null || status=$?
    if [ $status -ne 0 ]; then cat "/dev/fd/$said" >&2; fi
    exec {said}>&-
    return $status
}

# apt_install PACKAGE...: says what, and installs it.
apt_install() {
    command -v apt-get >/dev/null || die "needed and not here: $* (Debian's names; install them by hand)"
    [ "$(id -u)" -eq 0 ] || die "needed and not here: $*; as root: apt-get install $*"
    say "installing Debian packages: $*"
    quietly apt_get_install "$@" || die "apt-get could not install: $*"
}

apt_get_install() {
    local options=(--yes --no-install-recommends -o DPkg::Lock::Timeout=120)
    export DEBIAN_FRONTEND=noninteractive
    # Apart from our group: a machine whose dpkg was broken off installs nothing until somebody mends it, so Ctrl-C
    # and a signal to the group wait until it is through. A new machine has no package lists, an old one stale ones.
    setsid --wait apt-get install "${options[@]}" "$@" ||
        { setsid --wait apt-get update && setsid --wait apt-get install "${options[@]}" "$@"; }
}

# need PROGRAM...: every program is there afterwards; only what is missing is installed.
need() {
    local program packages=()
    for program in "$@"; do
        command -v "$program" >/dev/null || packages+=("$(package_of "$program")")
    done
    if [ ${#packages[@]} -gt 0 ]; then
        mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
        apt_install "${packages[@]}"
    fi
    for program in "$@"; do
        command -v "$program" >/dev/null || die "$program is still missing after its package was installed"
    done
}

# The servers of the ready-made hooks' tests, which start instances of their own: what the packages start is not wanted.
need_servers() {
    local packages=()
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql)
    command -v mariadbd >/dev/null || packages+=(mariadb-server)
    if [ ${#packages[@]} -eq 0 ]; then return; fi
    apt_install "${packages[@]}"
    if [ -d /run/systemd/system ]; then quietly systemctl disable --now "${packages[@]%-server}"; fi
}

# Sets `python` to a Python of 3.11 or later that can make virtual environments. PYTHON names one.
find_python() {
    local candidate bare=
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        python=$(command -v "$candidate") || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$python" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
        bare=${bare:-$python}
    done
    [ -n "$bare" ] || die "no Python of 3.11 or later was found; name one with PYTHON=..."
    # Debian keeps venv apart from Python, in a package named after its version.
    python=$bare
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' || die "$python still cannot make virtual environments"
}

# Everything the environment was made from. A checkout that moved, another Python, a changed
# lock or pyproject.toml: each gives another stamp.
stamp_of() {
    { echo "$checkout"; .venv/bin/python -VV; cat pyproject.toml "$@"; } | sha256sum
}

# current STAMP LOCK...: was .venv made from these locks, and is it usable still?
current() {
    local stamp=$1
    shift
    .venv/bin/python -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$(stamp_of "$@")" ]
}

# environment runtime|dev: .venv holds the locked packages and this checkout, editable.
environment() {
    local stamp=.venv/stamp-runtime locks=(requirements.txt requirements-build.txt) lock arguments=()
    # The development lock holds the other two, with the same releases.
    if current .venv/stamp-dev requirements-dev.txt; then return; fi
    if [ "$1" = dev ]; then
        stamp=.venv/stamp-dev locks=(requirements-dev.txt)
    elif current "$stamp" "${locks[@]}"; then
        return
    fi

    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(cat .venv/checkout 2>/dev/null)" != "$checkout" ]; then
        find_python
        say "making .venv with $("$python" -V)"
        quietly "$python" -m venv --clear .venv
        echo "$checkout" >.venv/checkout
    fi
    rm -f .venv/stamp-*
    say "installing the packages of ${locks[*]} into .venv (hashes checked)"
    for lock in "${locks[@]}"; do arguments+=(-r "$lock"); done
    quietly .venv/bin/python -m pip install --require-hashes "${arguments[@]}"
    # The build backend came with the lock, so nothing is fetched unchecked here.
    quietly .venv/bin/python -m pip install --no-deps --no-build-isolation --editable .
    stamp_of "${locks[@]}" >"$stamp"
}
