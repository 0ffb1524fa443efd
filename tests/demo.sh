#!/usr/bin/env bash
# What Walden is for, in about a minute: a throw-away PostgreSQL server is archived and backed up, loses a table to an
# accident, and comes back as it was just before. Everything lies in one temporary folder; nothing is left running.
#
# WALDEN=PATH takes a binary that is built already. KEEP=1 leaves the folder behind.
set -euo pipefail
umask 022
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi
title() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }
# What the reader would type; the helpers that make it work in a temporary folder are left out.
shown() { printf '%s   $ %s%s\n' "$dim" "$*" "$plain"; }
fail() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

# ---- parts -----------------------------------------------------------------------------------------------------------

pg_bin="$("$project/tests/setup/postgres.sh" any | tail -n 1)"
if [ -z "${WALDEN:-}" ]; then
  command -v cargo >/dev/null || fail "cargo is not here: please install Rust 1.95 or newer (https://rustup.rs)"
  title "Building Walden (the first time takes some minutes)"
  note "Quick to build and good enough here; \`cargo build --release\` makes the binary for real use."
  (cd "$project" && cargo build --locked --bin walden)
  WALDEN="${CARGO_TARGET_DIR:-$project/target}/debug/walden"
fi

# ---- a stage that is cleaned up on any exit --------------------------------------------------------------------------

stage="$(mktemp -d "${TMPDIR:-/tmp}/walden-demo.XXXXXX")"
# A Unix socket's path may have 107 bytes.
if [ ${#stage} -gt 60 ]; then
  rmdir "$stage"
  stage="$(mktemp -d /tmp/walden-demo.XXXXXX)"
fi
chmod 755 "$stage"
agent_pid='' server_pid=''

stop() { # stop PID SIGNAL: asks, waits, insists
  [ -n "$1" ] || return 0
  kill "-$2" "$1" 2>/dev/null || return 0
  local turn
  for turn in $(seq 150); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
}

# The first process of whatever server runs over a data directory.
postmaster() { head -n 1 "$1/postmaster.pid" 2>/dev/null || true; }

cleanup() {
  local status=$?
  trap - EXIT INT TERM HUP
  set +e
  stop "$agent_pid" TERM
  stop "$(postmaster "$stage/restored")" QUIT
  stop "$server_pid" QUIT
  wait 2>/dev/null
  if [ $status != 0 ]; then
    local log
    for log in "$stage"/*.log; do
      [ -s "$log" ] && printf '\n--- the end of %s\n' "$(basename "$log")" >&2 && tail -n 15 "$log" >&2
    done
    printf '\ndemo: FAILED (%s)\n' "$status" >&2
  fi
  if [ -n "${KEEP:-}" ]; then echo "kept: $stage"; else rm -rf "$stage"; fi
  exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# PostgreSQL refuses root. Then servers and Walden run as `postgres` or `nobody`, over copies that this user can reach.
prefix=()
cd "$stage"
if [ "$(id -u)" = 0 ]; then
  user=''
  for name in postgres nobody; do if id -u "$name" >/dev/null 2>&1; then user="$name" && break; fi; done
  [ -n "$user" ] || fail "PostgreSQL refuses to run as root, and there is no user postgres or nobody: please run this as an ordinary user"
  prefix=(setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups --)
  chown "$user" "$stage"
  cp "$WALDEN" "$stage/walden"
  WALDEN="$stage/walden"
  if ! "${prefix[@]}" test -x "$pg_bin/postgres" 2>/dev/null; then
    home="$(dirname "$pg_bin")"
    case "$home" in "$project"/.cache/unpacked/*) home="$project/.cache/unpacked" ;; esac
    cp -a "$home" "$stage/parts"
    pg_bin="$stage/parts${pg_bin#"$home"}"
  fi
fi
as() { ${prefix[@]+"${prefix[@]}"} "$@"; }
case "$pg_bin" in
*/usr/lib/postgresql/*/bin)
  root="${pg_bin%/usr/lib/postgresql/*}"
  if [ -n "$root" ]; then
    export LD_LIBRARY_PATH="$root/usr/lib/$(uname -m)-linux-gnu:$root/lib/$(uname -m)-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  fi
  ;;
esac
export PATH="$pg_bin:$PATH" HOME="$stage" LC_ALL=C TZ=UTC
unset ${!PG*} ${!WALDEN_*} DATABASE_URL 2>/dev/null || true
command -v psql >/dev/null || fail "psql is not here: please install the PostgreSQL client"

free_port() {
  local port
  for _ in $(seq 200); do
    port=$((12000 + RANDOM % 18000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port" && return; }
  done
  fail "no free port"
}
port="$(free_port)"
http="$(free_port)"
while [ "$http" = "$port" ]; do http="$(free_port)"; done

walden() { as "$WALDEN" --config "$stage/walden.toml" "$@"; }
query() { psql -h "$stage" -p "$port" -U postgres -d postgres -X -q -v ON_ERROR_STOP=1 "$@"; }
value() { query -At -c "$1"; }
wait_for() { # wait_for SECONDS WHAT COMMAND...
  local deadline=$((SECONDS + $1)) what="$2"
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || fail "waited in vain for: $what"
    [ -z "$agent_pid" ] || kill -0 "$agent_pid" 2>/dev/null || fail "walden ended before: $what"
    sleep 0.1
  done
}

# ---- 1 ---------------------------------------------------------------------------------------------------------------

title "1. A PostgreSQL server, thrown away afterwards"
note "$(postgres --version), in $stage"
shown "initdb -D data && postgres -D data"
as initdb -D "$stage/data" -U postgres -A trust -E UTF8 --locale=C --data-checksums >"$stage/initdb.log" 2>&1
${prefix[@]+"${prefix[@]}"} postgres -D "$stage/data" -c port="$port" -c listen_addresses='' -c unix_socket_directories="$stage" -c fsync=on >"$stage/server.log" 2>&1 &
server_pid=$!
wait_for 60 "PostgreSQL to answer" value "SELECT 1"
# The restored server reads the same file, so its port and socket folder belong there too.
printf "port = %s\nlisten_addresses = ''\nunix_socket_directories = '%s'\n" "$port" "$stage" | as tee -a "$stage/data/postgresql.conf" >/dev/null

# ---- 2 ---------------------------------------------------------------------------------------------------------------

title "2. Walden beside it: streams the WAL into a local folder and takes a first backup by itself"
as tee "$stage/walden.toml" >/dev/null <<TOML
[postgres]
url = "host=$stage port=$port user=postgres dbname=postgres"

[metrics]
listen = "127.0.0.1:$http"

[[repository]]
type = "local"
path = "archive"
TOML
sed 's/^/   | /' "$stage/walden.toml"
shown "walden --config walden.toml run"
${prefix[@]+"${prefix[@]}"} "$WALDEN" --config "$stage/walden.toml" run >"$stage/agent.log" 2>&1 &
agent_pid=$!
has_backup() { walden --json list | grep -q '"id"'; }
wait_for 120 "the first backup" has_backup
shown "walden status"
walden status | sed 's/^/   /' || true

# ---- 3 ---------------------------------------------------------------------------------------------------------------

title "3. Work goes on: rows are written after the backup"
shown "INSERT INTO account ..."
query -c "CREATE TABLE account (id int PRIMARY KEY, owner text NOT NULL, cents bigint NOT NULL)" \
  -c "INSERT INTO account SELECT n, 'owner ' || n, n * 100 FROM generate_series(1, 1000) n"
for turn in 1 2 3 4 5; do query -c "UPDATE account SET cents = cents + $turn WHERE id % 5 = $turn % 5"; done
before="$(value "SELECT count(*) || ' accounts, ' || sum(cents) || ' cents' FROM account")"
note "The books say: $before"
moment="$(value "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")"
note "It is now $bold$moment$plain"
sleep 1

# ---- 4 ---------------------------------------------------------------------------------------------------------------

title "4. An accident"
shown "DELETE FROM account WHERE id > 3;  DROP TABLE account;"
query -c "DELETE FROM account WHERE id > 3" -c "DROP TABLE account"
query -c "SELECT count(*) FROM account" 2>&1 | sed 's/^/   /' || true
# The segment is still open: its new bytes are shipped every second.
is_archived() { walden --json status | tr -d ' ' | grep -q '"rpo_bytes":0,'; }
wait_for 30 "the WAL of the accident to be in the repository" is_archived
note "The WAL of the accident is in the repository, although its segment is still open:"
as find "$stage/archive" -path '*/tail/*' -name '*.lz4' | sort | tail -n 2 | sed "s|$stage/|   |"
shown "walden list"
walden list | sed 's/^/   /'
note "The old server and the agent are stopped, and are not needed for what follows."
stop "$agent_pid" TERM
agent_pid=''
stop "$server_pid" INT
server_pid=''

# ---- 5 ---------------------------------------------------------------------------------------------------------------

title "5. Back to just before it, from the repository alone"
shown "walden restore --pgdata restored --target-time $moment --start"
walden restore --pgdata "$stage/restored" --target-time "$moment" --start 2>&1 | sed 's/^/   /'
after="$(value "SELECT count(*) || ' accounts, ' || sum(cents) || ' cents' FROM account")"
note "The books say: $after"
[ "$before" = "$after" ] || fail "the restored rows differ: before the accident $before"
[ "$(value "SELECT pg_is_in_recovery()")" = f ] || fail "the restored server does not take writes"
query -c "INSERT INTO account VALUES (0, 'new owner', 1)"
note "Every row is back, and the server takes writes again."

title "Done"
note "Stopping everything and removing $stage. Your turn: see README.md, \"First real use\"."
