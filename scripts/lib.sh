# shellcheck shell=bash disable=SC2034
# Shared by the scripts in this directory: where things are kept, and how progress is reported.
# Meant to be sourced by a bash script that has set -euo pipefail.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Everything that is slow to make or comes from the network lives in one cache outside of the
# checkout, so that a fresh clone on the same machine starts from it.
CACHE=${MACHINEN_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set}/.cache}/machinen}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# step TITLE COMMAND...: runs the command and reports how long it took.
step() {
  local title=$1 start=${EPOCHREALTIME/[.,]/}
  shift
  say "$title ..."
  "$@"
  local spent=$(((${EPOCHREALTIME/[.,]/} - start) / 1000))
  say "$title: done in $((spent / 1000)).$(printf %03d $((spent % 1000))) s"
}

# with_lock NAME COMMAND...: two runs that want the same cached thing make it once.
with_lock() {
  local name=$1 fd
  shift
  mkdir -p "$CACHE/lock"
  exec {fd}>"$CACHE/lock/$name"
  flock -n "$fd" || {
    say "waiting for another run that makes $name"
    flock "$fd"
  }
  # The command's children must not inherit the lock, else a daemon would keep it.
  "$@" {fd}>&-
  exec {fd}>&-
}

# publish FILE DEST: an atomic copy, so that no process ever reads half a file.
publish() {
  mkdir -p "$(dirname "$2")"
  cp --reflink=auto --sparse=always "$1" "$2.$$"
  mv -f "$2.$$" "$2"
}
