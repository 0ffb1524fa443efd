# Sourced by the scripts beside it: where things lie, and the three ways to get a part.
#
# Parts go into <project>/.cache only. Packages are downloaded and unpacked there, never installed: installing a server
# package would start a server. apt works on a private state below .cache/apt, so neither root nor an up-to-date
# system state is needed, and the system's own state is never touched.
set -euo pipefail
umask 022

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cache="$project/.cache"
unpacked="$cache/unpacked" # a small root file system of unpacked Debian packages
mkdir -p "$cache/bin"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Only one set-up at a time in this clone; a second one waits and then finds everything there.
lock() {
  if command -v flock >/dev/null; then
    exec 9>"$cache/lock"
    flock 9
  fi
}

# have TOOL: it is in .cache/bin already and still runs from there.
have() { [ -x "$cache/bin/$1" ]; }

# link PATH [NAME]: makes a program that exists elsewhere known under .cache/bin.
link() { ln -sfn "$1" "$cache/bin/${2:-$(basename "$1")}"; }

# A program on PATH, resolved, or nothing.
on_path() { { command -v "$1" 2>/dev/null || true; } | head -n 1; }

apt_options() {
  apt_state="$cache/apt"
  mkdir -p "$apt_state"/lists/partial "$apt_state"/cache/archives/partial "$apt_state"/debs
  apt_set=(-qq -o Dir::State::lists="$apt_state/lists" -o Dir::Cache="$apt_state/cache" -o Debug::NoLocking=1
    -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3 -o Acquire::Languages=none
    -o APT::Get::Assume-Yes=1 -o Dir::Log=/dev/null "$@")
}

# again COMMAND...: up to three times, since a network may fail once.
again() {
  local try
  for try in 1 2 3; do
    "$@" && return 0
    [ "$try" = 3 ] || sleep $((try * 3))
  done
  return 1
}

# apt_update: refreshes the private package lists, once a day at most.
apt_update() {
  command -v apt-get >/dev/null || return 1
  apt_options
  if [ -z "$(find "$apt_state/updated" -mtime -1 2>/dev/null)" ]; then
    say "reading the package lists (kept in .cache/apt)"
    # A broken third-party source must not stand in the way of Debian's own packages; without any list there is nothing to take from.
    apt-get "${apt_set[@]}" update >"$apt_state/update.log" 2>&1 || say "apt-get update complained, see .cache/apt/update.log"
    if ls "$apt_state"/lists/*_Packages* >/dev/null 2>&1; then
      touch "$apt_state/updated"
    else
      say "no package lists could be had, see .cache/apt/update.log; the next start tries again"
      return 1
    fi
  fi
}

# apt_missing PACKAGE: the packages that an installation of PACKAGE would add here, itself included.
apt_missing() {
  apt-get "${apt_set[@]}" -s --no-install-recommends install "$1" 2>/dev/null | awk '/^Inst /{print $2}'
}

# unpack PACKAGE...: downloads the packages and unpacks them into $unpacked. No maintainer script runs.
unpack() {
  mkdir -p "$unpacked"
  (cd "$apt_state/debs" && rm -f ./*.deb && apt-get "${apt_set[@]}" download "$@") >"$apt_state/download.log" 2>&1 ||
    { tail -n 3 "$apt_state/download.log" >&2; return 1; }
  local deb
  for deb in "$apt_state"/debs/*.deb; do dpkg -x "$deb" "$unpacked"; done
  rm -f "$apt_state"/debs/*.deb
  rm -rf "$unpacked"/usr/share/doc "$unpacked"/usr/share/man "$unpacked"/usr/share/locale
  chmod -R a+rX "$unpacked"
}

# Where the libraries of unpacked packages lie, for LD_LIBRARY_PATH.
library_path() {
  local triplet
  triplet="$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch 2>/dev/null || echo "$(uname -m)-linux-gnu")"
  printf '%s:%s:%s' "$unpacked/usr/lib/$triplet" "$unpacked/lib/$triplet" "$unpacked/usr/lib"
}

# link_unpacked PATH [NAME]: as link, for an unpacked program, which needs the unpacked libraries.
link_unpacked() {
  local name="${2:-$(basename "$1")}"
  rm -f "$cache/bin/$name"
  printf '#!/bin/sh\nLD_LIBRARY_PATH="%s${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "%s" "$@"\n' "$(library_path)" "$1" >"$cache/bin/$name"
  chmod 755 "$cache/bin/$name"
}

# python_environment NAME PACKAGE: a Python environment of its own with this package, in .cache/NAME.
python_environment() {
  local home="$cache/$1" package="$2" log="$cache/$1.log" python pip=(-m pip)
  # The marker is written last: an environment that was interrupted half-way is made again.
  if [ "$(cat "$home/made-for" 2>/dev/null)" = "$package $cache" ]; then return; fi
  python="$(on_path python3)"
  [ -n "$python" ] || die "missing, please install: python3 (with venv)"
  say "making .cache/$1 with $package"
  rm -rf "$home"
  if ! "$python" -m venv "$home" >"$log" 2>&1; then
    # Debian's python3 has no pip to put into an environment; its wheel runs as it is.
    rm -rf "$home"
    { "$python" -m venv --without-pip "$home" && apt_update && unpack python3-pip-whl; } >>"$log" 2>&1 ||
      die "missing, please install: python3-venv (see .cache/$1.log)"
    pip=("$(ls "$unpacked"/usr/share/python-wheels/pip-*.whl | tail -n 1)/pip")
  fi
  again "$home/bin/python" "${pip[@]}" install --quiet --disable-pip-version-check "$package" >>"$log" 2>&1 ||
    die "pip could not install $package, see .cache/$1.log"
  echo "$package $cache" >"$home/made-for"
}
