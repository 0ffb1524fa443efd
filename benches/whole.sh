#!/usr/bin/env bash
# Whole runs against PostgreSQL's own tools, on the same WAL and the same data directory, in one go. Prints Markdown.
#
# BENCH_GIB   backlog of WAL in GiB (2)          BENCH_RUNS  repetitions, the median by wall time counts (3)
# BENCH_DIR   where the data lies (/tmp)         WALDEN      a binary built already
#
# Wall times are as good as the machine is quiet. CPU seconds are the process's own (/proc/PID/stat, 10 ms), the
# server's are not in them. Peak memory is VmHWM. Every contender writes to the same file system, flushed before.
[ -z "${WALDEN:-}" ] || WALDEN="$(realpath "$WALDEN")"
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
gib="${BENCH_GIB:-2}" runs="${BENCH_RUNS:-3}"

PATH="$("$project/tests/setup/postgres.sh" full | tail -n 1):$PATH"
"$project/tests/setup/tools.sh" lz4
"$project/tests/setup/s3.sh"
if [ -z "${WALDEN:-}" ]; then
  say "building the release binary"
  (cd "$project" && HOME="${BENCH_HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}" cargo build --release --locked --bin walden >&2)
  WALDEN="${CARGO_TARGET_DIR:-$project/target}/release/walden"
fi
cp "$WALDEN" "$stage/walden" && chmod 755 "$stage/walden"

# ---- the contenders --------------------------------------------------------------------------------------------------

round=0
# config NAME [S3]: a fresh agent's configuration in $stage/NAME.toml, with a slot of its own that holds the backlog.
config() {
  http="$(free_port)"
  value "SELECT pg_copy_physical_replication_slot('backlog', '$1')" >/dev/null
  {
    printf '[postgres]\nurl = "host=127.0.0.1 port=%s user=postgres dbname=postgres"\nslot = "%s"\n' "$port" "$1"
    printf '[archive]\ncluster = "bench"\ncompression = "%s"\n' "${compression:-lz4}"
    printf '[spool]\npath = "%s/%s-spool"\nbytes_max = "64GiB"\nfree_bytes_min = 0\n[state]\npath = "%s/%s-state"\n' "$stage" "$1" "$stage" "$1"
    printf '[backup]\ninitial = false\n[metrics]\nlisten = "127.0.0.1:%s"\n[[repository]]\nname = "main"\n' "$http"
    if [ "${2:-}" = S3 ]; then
      printf 'type = "s3"\nbucket = "bench"\nprefix = "%s"\nregion = "us-east-1"\nendpoint = "http://127.0.0.1:%s"\npath_style = true\n' "$1" "$s3_port"
    else
      printf 'type = "local"\npath = "%s/%s-archive"\n' "$stage" "$1"
    fi
  } | as tee "$stage/$1.toml" >/dev/null
}
forget() { # a slot and the files of a run
  value "SELECT pg_drop_replication_slot('$1')" >/dev/null
  rm -rf "$stage/$1-spool" "$stage/$1-state" "$stage/$1-archive" "$stage/$1-wal"
}
# archived: the agent says that everything before $goal is in the repository.
archived() {
  local line reached
  exec 3<>"/dev/tcp/127.0.0.1/$http" 2>/dev/null || return 1
  printf 'GET /status HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  reached="$(tr -d '\r\n ' <&3 | sed -n 's/.*"archived_lsn":"\([0-9A-F]*\/[0-9A-F]*\)".*/\1/p')"
  exec 3>&-
  [ -n "$reached" ] && [ $((16#${reached%/*} << 32 | 16#${reached#*/})) -ge "$goal" ]
} 2>/dev/null

stream_walden() { # stream_walden [S3]
  local name="walden_$((round += 1))"
  config "$name" "${1:-}"
  sync
  run_until archived "$stage/walden" --config "$stage/$name.toml" run
  stored=0
  [ -n "${1:-}" ] || stored="$(stored_bytes "$stage/$name-archive/bench")"
  forget "$name"
}
stream_receivewal() {
  local name="receive_$((round += 1))"
  value "SELECT pg_copy_physical_replication_slot('backlog', '$name')" >/dev/null
  as mkdir "$stage/$name-wal"
  sync
  run_to_end pg_receivewal -h 127.0.0.1 -p "$port" -U postgres -D "$stage/$name-wal" -S "$name" --compress=lz4 --no-loop --endpos="$goal_lsn"
  stored="$(stored_bytes "$stage/$name-wal")"
  forget "$name"
}

# median COMMAND...: runs it $runs times; $wall $cpu $peak $stored of the run in the middle by wall time.
median() {
  local turn results=''
  for turn in $(seq "$runs"); do
    "$@"
    say "  $* : $wall s wall, $cpu s CPU, $((peak / 1024)) MiB peak"
    results+="$wall $cpu $peak $stored"$'\n'
  done
  read -r wall cpu peak stored < <(printf %s "$results" | sort -g | sed -n "$(((runs + 1) / 2))p")
}
per_gib() { bc <<<"scale=2; $1 / ($raw / 1073741824)" | sed 's/^\./0./'; }
ratio() { bc <<<"scale=2; $1 / $2" | sed 's/^\./0./'; }
mib() { echo $(($1 / 1024)); }
row() { local IFS='|'; printf '|%s|\n' "$*" | sed 's/|/ | /g; s/^ //; s/ $//'; }

# ---- a backlog of real WAL -------------------------------------------------------------------------------------------

say "a server with $gib GiB of WAL: pgbench's load, its transactions, a bulk insert, an index"
server pg 16
value "SELECT pg_create_physical_replication_slot('backlog', true)" >/dev/null
first="$(value "SELECT restart_lsn FROM pg_replication_slots")"
so_far() { value "SELECT (pg_current_wal_lsn() - '$first')::bigint"; }
pg() { PGHOST="$stage" PGPORT="$port" PGUSER=postgres PGDATABASE=postgres pgbench "$@" >"$stage/pgbench.log" 2>&1; }
pg -i -q -s $((gib * 25))
pg -n -c 4 -T 20 -M prepared
turn=0
while [ "$(so_far)" -lt $((gib * 1073741824)) ]; do
  turn=$((turn + 1))
  query -c "CREATE TABLE bulk_$turn AS SELECT n, md5(n::text) AS a, md5((n * 7)::text) || repeat('x', 40) AS b, now() AS c FROM generate_series(1, 1000000) n" \
    -c "CREATE INDEX ON bulk_$turn (a)"
  pg -n -c 4 -T 10 -M prepared
done
query -c CHECKPOINT
goal_lsn="$(value "SELECT pg_switch_wal()" >/dev/null && value "SELECT '0/0'::pg_lsn + (pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint / 16777216 * 16777216)")"
# pg_receivewal stops when it has seen something after its end.
value "SELECT pg_logical_emit_message(true, 'bench', 'end')" >/dev/null
goal=$((16#${goal_lsn%/*} << 32 | 16#${goal_lsn#*/}))
raw=$((goal - (16#${first%/*} << 32 | 16#${first#*/}) / 16777216 * 16777216))
say "$((raw / 1048576)) MiB of WAL, up to $goal_lsn"

s3_server

table=()
say "streaming"
median stream_receivewal
theirs_wall="$wall" theirs_cpu="$cpu"
table+=("$(row 'stream: `pg_receivewal --compress=lz4`' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" '')")
median stream_walden
ours_cpu="$cpu"
table+=("$(row 'stream: walden, local, lz4' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" "wall $(ratio "$wall" "$theirs_wall") (≤ 0.8), CPU $(ratio "$cpu" "$theirs_cpu") (≤ 1.0), peak ≤ 48")")
compression=zstd
median stream_walden
table+=("$(row 'stream: walden, local, zstd' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" '')")
compression=lz4
median stream_walden S3
table+=("$(row 'stream: walden, S3 on loopback, lz4' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" '' "$(per_gib "$(bc <<<"$cpu - $ours_cpu")") CPU s/GiB more than local (≤ 0.8), peak ≤ 48")")

# ---- base backup and restore -----------------------------------------------------------------------------------------

say "base backup"
backup_theirs() {
  local folder="$stage/theirs_$((round += 1))"
  sync
  run_to_end pg_basebackup -h 127.0.0.1 -p "$port" -U postgres -D "$folder" -Ft --compress=client-lz4 -X none -c fast
  stored="$(stored_bytes "$folder")"
  rm -rf "$folder"
}
# An agent archives beside it, as in real life; only `walden backup` is measured.
config beside
${prefix[@]+"${prefix[@]}"} "$stage/walden" --config "$stage/beside.toml" run >"$stage/beside.log" 2>&1 &
beside=$!
background+=("$beside")
until archived; do kill -0 "$beside" || fail "the agent ended" && sleep 0.1; done
backup_walden() {
  sync
  run_to_end "$stage/walden" --config "$stage/beside.toml" backup
  newest="$(ls -d "$stage"/beside-archive/bench/*/backups/*/ | tail -n 1)"
  stored="$(stored_bytes "$newest")"
}
data="$(value "SELECT sum(pg_database_size(oid))::bigint FROM pg_database")"
raw_wal="$raw" raw="$data"
median backup_theirs
theirs_wall="$wall" theirs_cpu="$cpu"
table+=("$(row 'backup: `pg_basebackup -Ft --compress=client-lz4`' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" '')")
median backup_walden
table+=("$(row 'backup: walden, local, lz4' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" "wall $(ratio "$wall" "$theirs_wall") (≤ 1.0), CPU $(ratio "$cpu" "$theirs_cpu") (≤ 1.2), peak ≤ 128")")

say "restore"
by_hand='cd "$1" && ls "$2"/volumes/* | xargs -P 2 -I{} sh -c "lz4 -dcq {} | tar -x -f -" && sync'
restore_theirs() {
  local folder="$stage/plain_$((round += 1))"
  as mkdir "$folder"
  sync
  local begun=$EPOCHREALTIME
  as sh -c "$by_hand" sh "$folder" "$newest"
  wall="$(printf %.2f "$(bc <<<"$EPOCHREALTIME - $begun")")" cpu=0 peak=0 stored=0
  rm -rf "$folder"
}
restore_walden() {
  local folder="$stage/restored_$((round += 1))"
  sync
  run_to_end "$stage/walden" --config "$stage/beside.toml" restore --pgdata "$folder"
  rm -rf "$folder"
}
median restore_theirs
theirs_wall="$wall"
table+=("$(row 'restore: `lz4 -d` into `tar -x`, two at a time, then `sync`' "$wall" '' '' '' '' '')")
median restore_walden
table+=("$(row 'restore: walden' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" '' "wall $(ratio "$wall" "$theirs_wall") (≤ 1.0)")")

# ---- idle ------------------------------------------------------------------------------------------------------------

say "idle, 30 s"
observe "$beside"
before="$cpu"
sleep 30
observe "$beside"
idle="$(bc <<<"scale=2; ($cpu - $before) * 100 / 30" | sed 's/^\./0./')"
table+=("$(row 'idle agent, 30 s' 30 "$(bc <<<"$cpu - $before" | sed 's/^\./0./')" '' "$(mib "$peak")" '' "$idle % of a core (< 0.5)")")
kill -TERM "$beside"
kill -QUIT "$server_pid"
wait "$beside" "$server_pid" 2>/dev/null || true
rm -rf "$stage"/beside-* "$stage/pg"

# ---- memory with big segments that do not compress -------------------------------------------------------------------

say "1 GiB segments of random bytes"
server big 1024
value "SELECT pg_create_physical_replication_slot('backlog', true)" >/dev/null
first="$(value "SELECT restart_lsn FROM pg_replication_slots")"
query -c "CREATE EXTENSION pgcrypto" -c "CREATE TABLE noise (bytes bytea)" -c "ALTER TABLE noise ALTER bytes SET STORAGE EXTERNAL"
while [ "$(so_far)" -lt 2684354560 ]; do
  query -c "INSERT INTO noise SELECT string_agg(gen_random_bytes(1024), '') FROM generate_series(1, 131072) n GROUP BY n / 64"
done
segment=1073741824
goal_lsn="$(value "SELECT '0/0'::pg_lsn + (pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint / $segment * $segment)")"
goal=$((16#${goal_lsn%/*} << 32 | 16#${goal_lsn#*/}))
raw=$((goal - (16#${first%/*} << 32 | 16#${first#*/}) / segment * segment))
runs=1
median stream_walden
table+=("$(row 'stream: walden, local, 1 GiB segments, incompressible' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" "$((stored / 1048576))" 'peak ≤ 48')")
median stream_walden S3
table+=("$(row 'stream: walden, S3, 1 GiB segments, incompressible' "$wall" "$cpu" "$(per_gib "$cpu")" "$(mib "$peak")" '' 'peak ≤ 48')")

# ---- the table -------------------------------------------------------------------------------------------------------

printf '\n%s, %s cores, %s, walden %s; %s MiB of WAL, %s MiB of data; median of %s\n\n' \
  "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$(postgres --version)" \
  "$("$stage/walden" --version | cut -d' ' -f 2)" "$((raw_wal / 1048576))" "$((data / 1048576))" "${BENCH_RUNS:-3}"
echo '| what | wall s | CPU s | CPU s/GiB raw | peak MiB | stored MiB | against (target) |'
echo '| --- | ---: | ---: | ---: | ---: | ---: | --- |'
printf '%s\n' "${table[@]}"
