# Sourced by whole.sh and tail.sh: throw-away servers, and the measuring of one process.

set -euo pipefail
umask 022
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

fail() {
  printf '\nbench: %s\n' "$*" >&2
  exit 1
}
say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

stage="$(mktemp -d "${BENCH_DIR:-/tmp}/walden-bench.XXXXXX")"
chmod 755 "$stage"
cd "$stage"
background=() # pids that have to go on any exit

cleanup() {
  local status=$? pid
  trap - EXIT INT TERM HUP
  set +e
  for pid in ${background[@]+"${background[@]}"}; do kill -QUIT "$pid" 2>/dev/null; done
  sleep 1
  for pid in ${background[@]+"${background[@]}"}; do kill -KILL "$pid" 2>/dev/null; done
  wait 2>/dev/null
  if [ $status != 0 ]; then tail -n 15 "$stage"/*.log >&2; fi
  if [ -n "${KEEP:-}" ]; then echo "kept: $stage" >&2; else cd / && rm -rf "$stage"; fi
  exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# As in the demo: root runs servers and clients as an ordinary user, over copies that this user can reach.
prefix=()
if [ "$(id -u)" = 0 ]; then
  user=''
  for name in postgres nobody; do if id -u "$name" >/dev/null 2>&1; then user="$name" && break; fi; done
  [ -n "$user" ] || fail "PostgreSQL refuses root, and there is no user postgres or nobody"
  prefix=(setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups --)
  chown "$user" "$stage"
fi
as() { ${prefix[@]+"${prefix[@]}"} "$@"; }
export HOME="$stage" LC_ALL=C TZ=UTC
unset ${!PG*} ${!WALDEN_*} ${!AWS_*} DATABASE_URL 2>/dev/null || true

free_port() {
  local port
  for _ in $(seq 200); do
    port=$((12000 + RANDOM % 18000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port" && return; }
  done
  fail "no free port"
}

# An S3 server with the bucket "bench"; sets $s3_port.
s3_server() {
  local turn
  s3_port="$(free_port)"
  "$project/.cache/venv/bin/moto_server" -H 127.0.0.1 -p "$s3_port" >"$stage/moto.log" 2>&1 &
  background+=($!)
  export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=bench
  for turn in $(seq 300); do
    if curl -sf -o /dev/null -X PUT "http://127.0.0.1:$s3_port/bench"; then return; fi
    sleep 0.1
  done
  fail "the S3 server does not answer"
}

# server NAME SEGMENT_MIB: initdb and start; sets $port and $server_pid. Its WAL is kept by slots only.
server() {
  local name="$1"
  port="$(free_port)"
  as initdb -D "$stage/$name" -U postgres -A trust -E UTF8 --locale=C --data-checksums --no-sync --wal-segsize="$2" >"$stage/$name-initdb.log" 2>&1
  as tee -a "$stage/$name/postgresql.conf" >/dev/null <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$stage'
port = $port
max_wal_senders = 16
max_replication_slots = 64
wal_level = replica
autovacuum = off
fsync = off
synchronous_commit = off
shared_buffers = '512MB'
max_wal_size = '8GB'
checkpoint_timeout = '1h'
log_checkpoints = off
CONF
  ${prefix[@]+"${prefix[@]}"} postgres -D "$stage/$name" >"$stage/$name.log" 2>&1 &
  server_pid=$!
  background+=("$server_pid")
  local turn
  for turn in $(seq 300); do
    if value "SELECT 1" >/dev/null 2>&1; then return; fi
    kill -0 "$server_pid" 2>/dev/null || fail "PostgreSQL does not start"
    sleep 0.1
  done
  fail "PostgreSQL does not answer"
}

query() { psql -h "$stage" -p "$port" -U postgres -d postgres -X -q -v ON_ERROR_STOP=1 "$@"; }
value() { query -At -c "$1"; }

ticks="$(getconf CLK_TCK)"

# observe PID: CPU seconds and peak resident KiB so far, into $cpu and $peak; false when the process has gone.
observe() {
  local stat fields line
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  fields=(${stat##*) })
  [ "${fields[0]}" != Z ] || return 1
  # Fields 14 and 15 of proc(5), counted from the third, which is first here.
  cpu="$(((fields[11] + fields[12]) * 100 / ticks))"
  cpu="$((cpu / 100)).$(printf %02d $((cpu % 100)))"
  while read -r line; do
    case "$line" in VmHWM:*) fields=($line) && peak="${fields[1]}" ;; esac
  done 2>/dev/null <"/proc/$1/status" || true
}

# run_to_end COMMAND...: wall and CPU seconds and peak memory of a program that ends by itself, in $wall $cpu $peak.
run_to_end() {
  local pid status=0 begun=$EPOCHREALTIME
  ${prefix[@]+"${prefix[@]}"} "$@" >"$stage/run.log" 2>&1 &
  pid=$!
  background+=("$pid")
  peak=0 cpu=0
  while observe "$pid"; do sleep 0.02; done
  wait "$pid" || status=$?
  wall="$(printf %.2f "$(bc <<<"$EPOCHREALTIME - $begun")")"
  [ $status = 0 ] || fail "$1 ended with status $status"
}

# run_until CONDITION COMMAND...: the same for a program that has to be stopped once CONDITION (a command) holds.
run_until() {
  local pid condition="$1" begun=$EPOCHREALTIME deadline=$((SECONDS + 900))
  shift
  ${prefix[@]+"${prefix[@]}"} "$@" >"$stage/run.log" 2>&1 &
  pid=$!
  background+=("$pid")
  until $condition; do
    kill -0 "$pid" 2>/dev/null || fail "$1 ended too early"
    [ $SECONDS -lt $deadline ] || fail "$1 is not done after 15 minutes"
    sleep 0.02
  done
  wall="$(printf %.2f "$(bc <<<"$EPOCHREALTIME - $begun")")"
  observe "$pid"
  kill -TERM "$pid"
  wait "$pid" 2>/dev/null || true
}

stored_bytes() { du -sb --apparent-size "$1" | cut -f 1; }
