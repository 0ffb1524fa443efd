#!/usr/bin/env bash
# s3.sh: moto, an S3 server that honours conditional writes, in a Python environment of its own (.cache/venv).
. "$(dirname "$0")/lib.sh"
lock
moto='moto[server,s3]==5.2.5'
# The marker is written last: an environment that was interrupted half-way is made again.
if [ "$(cat "$cache/venv/made-for" 2>/dev/null)" = "$moto $cache" ]; then exit 0; fi
python="$(on_path python3)"
[ -n "$python" ] || die "missing, please install: python3 (with venv)"
say "making .cache/venv with $moto"
rm -rf "$cache/venv"
pip=(-m pip)
if ! "$python" -m venv "$cache/venv" >"$cache/venv.log" 2>&1; then
  # Debian's python3 has no pip to put into an environment; its wheel runs as it is.
  rm -rf "$cache/venv"
  { "$python" -m venv --without-pip "$cache/venv" && apt_update && unpack python3-pip-whl; } >>"$cache/venv.log" 2>&1 ||
    die "missing, please install: python3-venv (see .cache/venv.log)"
  pip=("$(ls "$unpacked"/usr/share/python-wheels/pip-*.whl | tail -n 1)/pip")
fi
again "$cache/venv/bin/python" "${pip[@]}" install --quiet --disable-pip-version-check "$moto" >>"$cache/venv.log" 2>&1 ||
  die "pip could not install $moto, see .cache/venv.log"
link "$cache/venv/bin/moto_server"
echo "$moto $cache" >"$cache/venv/made-for"
