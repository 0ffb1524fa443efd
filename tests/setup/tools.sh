#!/usr/bin/env bash
# tools.sh [NAME[=PACKAGE]]...: small command line tools, from PATH or else unpacked from the distribution's packages.
# Default: lz4 and zstd. What cannot be had is listed on one line, and the exit status is 1.
. "$(dirname "$0")/lib.sh"
lock
[ $# -gt 0 ] || set -- lz4 zstd

# fetch NAME PACKAGE: the package alone, and what it needs only if it does not run without.
fetch() {
  local program packages
  apt_update || return 1
  unpack "$2" 2>/dev/null || return 1
  program="$(find "$unpacked" -path '*bin/*' -name "$1" -perm -u+x 2>/dev/null | head -n 1)"
  [ -n "$program" ] || return 1
  if ldd "$program" 2>/dev/null | grep -q 'not found'; then
    mapfile -t packages < <(apt_missing "$2")
    unpack "${packages[@]}" || return 1
  fi
  link_unpacked "$program"
  say "$1: unpacked from the package $2"
}

lost=()
for want in "$@"; do
  name="${want%%=*}"
  if have "$name"; then continue; fi
  found="$(on_path "$name")"
  if [ -n "$found" ]; then
    link "$found"
  else
    fetch "$name" "${want##*=}" || lost+=("${want##*=}")
  fi
done
[ ${#lost[@]} = 0 ] || die "missing, please install: ${lost[*]}"
