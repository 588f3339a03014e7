# Sourced by the ready-made hooks beside it: a database session that is kept open from a hook's begin to its end.
# It reads its commands from a fifo and ends by itself at the deadline, whoever else has died. Everything in it
# holds the lock of one file, so that others know whether it lives, without trusting a process number.
# shellcheck shell=sh

dir=$BLOCKBAK_HOOK_DIR

# session COMMAND...: start it. One that an earlier try of the begin has left is ended first.
session() {
    drop
    mkfifo "$dir/in"
    # Who waits for its words may look before it has begun.
    : >"$dir/out"
    # Both are open and locked before it starts: what is told it meanwhile is not lost, and it counts as alive.
    # Opened for reading and writing, the fifo never ends for it, and nobody waits to open it.
    exec 8<>"$dir/in" 9>"$dir/alive"
    flock 9
    # In a session of its own, it is not ended together with the begin.
    setsid timeout --foreground --kill-after=2 "$BLOCKBAK_DEADLINE" "$@" <&8 8<&- >"$dir/out" 2>"$dir/err" &
    echo $! >"$dir/pid"
    exec 8<&- 9>&-
}

begun() { [ -p "$dir/in" ]; }

alive() { ! flock --nonblock "$dir/alive" true; }

# tell TEXT: a line for the session to read.
tell() { printf '%s\n' "$1" 1<>"$dir/in"; }

# await LINE: until the session has printed it. Fails when the session is over, and says what it said.
await() {
    until grep -qxF "$1" "$dir/out"; do
        if ! alive; then
            cat "$dir/err" >&2
            return 1
        fi
        sleep 0.05
    done
}

# drop: the session is over afterwards, and forgotten.
drop() {
    begun || return 0
    if alive; then
        kill -s TERM -- "-$(cat "$dir/pid")" || true
        flock --timeout 5 "$dir/alive" true
    fi
    rm -f "$dir/in" "$dir/out"
}
