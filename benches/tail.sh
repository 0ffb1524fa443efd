#!/usr/bin/env bash
# What the tail and the synchronous mode cost and give, as Markdown.
#
# BENCH_RATE     transactions per second of pgbench's own script, the busy load (500); the quiet one is 100 one-row commits
# BENCH_SECONDS  of each measurement (10)         BENCH_RUNS  repetitions for CPU and RPO, the median counts (3)
# BENCH_DIR      where the data lies (/tmp)       WALDEN      a binary built already
# BENCH_PARTS    which tables (rpo requests commits)
#
# RPO is sampled against the repository's own content, see rpo.py. CPU seconds are the agent's own (/proc/PID/stat). Requests are
# counted from the log of an S3 server (moto) in runs of their own, whose CPU is not measured.
[ -z "${WALDEN:-}" ] || WALDEN="$(realpath "$WALDEN")"
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rate="${BENCH_RATE:-500}" seconds="${BENCH_SECONDS:-10}" runs="${BENCH_RUNS:-3}" parts="${BENCH_PARTS:-rpo requests commits}"
segment_mib=16

PATH="$("$project/tests/setup/postgres.sh" full | tail -n 1):$PATH"
"$project/tests/setup/s3.sh"
if [ -z "${WALDEN:-}" ]; then
  say "building the release binary"
  (cd "$project" && HOME="${BENCH_HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}" cargo build --release --locked --bin walden >&2)
  WALDEN="${CARGO_TARGET_DIR:-$project/target}/release/walden"
fi
cp "$WALDEN" "$stage/walden"
chmod 755 "$stage/walden"
wanted() { [[ " $parts " = *" $1 "* ]]; }
row() { local IFS='|'; printf '|%s|\n' "$*" | sed 's/|/ | /g; s/^ //; s/ $//'; }
middle() { sort -g | sed -n "$((($1 + 1) / 2))p"; }
calc() { bc <<<"scale=${2:-2}; $1" | sed 's/^\./0./; s/^-\./-0./'; }

round=0
# agent ARCHIVE [S3]: starts a fresh agent with these lines in [archive]; sets $name, $pid, $http.
agent() {
  name="walden_$((round += 1))"
  http="$(free_port)"
  {
    printf '[postgres]\nurl = "host=127.0.0.1 port=%s user=postgres dbname=postgres"\nslot = "%s"\n' "$port" "$name"
    printf '[archive]\ncluster = "bench"\n%b\n[backup]\ninitial = false\n[metrics]\nlisten = "127.0.0.1:%s"\n' "$1" "$http"
    printf '[spool]\npath = "%s/%s-spool"\nfree_bytes_min = 0\n[state]\npath = "%s/%s-state"\n' "$stage" "$name" "$stage" "$name"
    if [ "${2:-}" = S3 ]; then
      printf '[[repository]]\ntype = "s3"\nbucket = "bench"\nprefix = "%s"\nregion = "us-east-1"\nendpoint = "http://127.0.0.1:%s"\npath_style = true\n' "$name" "$s3_port"
    else
      printf '[[repository]]\ntype = "local"\npath = "%s/%s-archive"\n' "$stage" "$name"
    fi
  } | as tee "$stage/$name.toml" >/dev/null
  ${prefix[@]+"${prefix[@]}"} "$stage/walden" --config "$stage/$name.toml" run >"$stage/$name.log" 2>&1 &
  pid=$!
  background+=("$pid")
  local turn
  for turn in $(seq 300); do
    if [ "$(value "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walden' AND state = 'streaming'")" = 1 ]; then return; fi
    kill -0 "$pid" 2>/dev/null || fail "the agent ended"
    sleep 0.1
  done
  fail "the agent does not stream"
}
forget() { # the agent, its slot and its files
  kill -TERM "$pid"
  wait "$pid" 2>/dev/null || true
  value "SELECT pg_drop_replication_slot('$name')" >/dev/null
  rm -rf "$stage/$name-spool" "$stage/$name-state" "$stage/$name-archive"
}
set_server() { # set_server NAME=VALUE...
  local setting
  for setting in "$@"; do query -c "ALTER SYSTEM SET ${setting%%=*} = '${setting#*=}'"; done
  value "SELECT pg_reload_conf()" >/dev/null
  sleep 1
}
pg() { PGHOST=127.0.0.1 PGPORT="$port" PGUSER=postgres PGDATABASE=postgres pgbench -n "$@" >"$stage/pgbench.log" 2>&1; }

say "a server with pgbench's tables"
server pg "$segment_mib"
PGHOST=127.0.0.1 PGPORT="$port" PGUSER=postgres PGDATABASE=postgres pgbench -i -q -s 20 >"$stage/pgbench.log" 2>&1
query -c "CREATE TABLE rows (n bigserial PRIMARY KEY, padding text)"
# What is flushed is what was acknowledged.
set_server synchronous_commit=on
folder_of() { echo "$stage/$name-archive/bench/$(value "SELECT system_identifier FROM pg_control_system()")"; }

echo "INSERT INTO rows (padding) VALUES (repeat('x', 80));" >"$stage/insert.sql"
# load KIND SECONDS: in the background, until $load ends.
load() {
  case "$1" in
  quiet) pg -c 4 --rate 100 -T "$2" -M prepared -f "$stage/insert.sql" & ;;
  busy) pg -c 4 --rate "$rate" -T "$2" -M prepared & ;;
  esac
  load=$!
  background+=("$load")
  sleep 2
}

# ---- the tail: what would be lost, and CPU ---------------------------------------------------------------------------

tail_once() { # tail_once LOAD INTERVAL: $cpu of the agent, $p50 $p99 $most of the RPO, $wal in MiB
  local before
  query -c CHECKPOINT
  agent "tail_interval = \"$2s\""
  load "$1" $((seconds + 3))
  observe "$pid" && before="$cpu"
  read -r p50 p99 most wal < <(python3 "$project/benches/rpo.py" "$(folder_of)" $((segment_mib << 20)) "$seconds" psql -h "$stage" -p "$port" -U postgres -d postgres -X -q -At)
  observe "$pid"
  cpu="$(calc "$cpu - $before")"
  wait "$load"
  forget
}
table=()
measure_rpo() {
  local kind interval turn cpus p50s p99s mosts off
  for kind in quiet busy; do for interval in 0 0.2 1 5; do
    cpus='' p50s='' p99s='' mosts=''
    for turn in $(seq "$runs"); do
      tail_once "$kind" "$interval"
      say "$kind, tail_interval $interval s: RPO p50 $p50 p99 $p99 max $most s, $cpu s CPU, $wal MiB of WAL"
      cpus+="$cpu"$'\n' p50s+="$p50"$'\n' p99s+="$p99"$'\n' mosts+="$most"$'\n'
    done
    cpu="$(printf %s "$cpus" | middle "$runs")" p50="$(printf %s "$p50s" | middle "$runs")" p99="$(printf %s "$p99s" | middle "$runs")"
    most="$(printf %s "$mosts" | sort -g | tail -n 1)"
    if [ "$interval" = 0 ]; then
      off="$cpu"
      table+=("$(row "$kind, $wal MiB" off "$p50" "$p99" "$most" "$cpu" '')")
    else
      table+=("$(row "$kind, $wal MiB" "$interval s" "$p50" "$p99" "$most" "$cpu" "$(calc "($cpu - $off) * 100 / $off" 1) %")")
    fi
  done; done
}
if wanted rpo; then measure_rpo; fi

# ---- the tail: requests ----------------------------------------------------------------------------------------------

requests=()
# count_requests WHAT INTERVAL SECONDS: a row of the requests in the next seconds, by kind, per second; and what a day of them costs
# by the list price of S3 standard: 0.005 USD for 1,000 PUT and LIST, 0.0004 for 1,000 GET and HEAD, nothing for DELETE.
count_requests() {
  local from lines pieces coverage lease lists puts reads deletes
  from="$(wc -l <"$stage/moto.log")"
  sleep "$3"
  lines="$(tail -n "+$((from + 1))" "$stage/moto.log" | grep -o '"[A-Z]* [^ ]* HTTP' || true)"
  matching() { grep -cE "$1" <<<"$lines" || true; }
  pieces="$(matching '^"PUT [^ ]*/tail/')" coverage="$(matching '^"PUT [^ ]*coverage.json')" lease="$(matching '^"PUT [^ ]*lease.json')"
  lists="$(matching '^"GET [^ ]*list-type=')" puts="$(matching '^"(PUT|POST) ')" deletes="$(matching '^"DELETE ')"
  reads=$(($(matching '^"(GET|HEAD) ') - lists))
  per_second() { calc "$1 / $window" 3; }
  local window="$3"
  requests+=("$(row "$1" "$2" "$(per_second "$pieces")" "$(per_second "$coverage")" "$(per_second "$lease")" "$(per_second $((puts - pieces - coverage - lease)))" \
    "$(per_second "$lists")" "$(per_second "$reads")" "$(per_second "$deletes")" "$(per_second $((puts + lists + reads + deletes)))" \
    "$(calc "86.4 * (($puts + $lists) * 0.005 + $reads * 0.0004) / $window" 3)")")
  say "${requests[-1]}"
}
measure_requests() {
  local kind interval window
  s3_server
  for kind in quiet busy; do for interval in 0 0.2 1 5 30; do
    agent "tail_interval = \"${interval}s\"" S3
    window=$((seconds * 2))
    [ "$interval" != 30 ] || window=$((seconds * 6))
    load "$kind" $((window + 8))
    sleep 4
    count_requests "$kind" "$interval s" "$window"
    wait "$load"
    if [ "$kind$interval" = quiet1 ]; then
      # The server itself writes a record a while after the last transaction.
      sleep 20
      count_requests idle 'any' $((seconds * 4))
    fi
    forget
  done; done
}
if wanted requests; then measure_requests; fi

# ---- synchronous -----------------------------------------------------------------------------------------------------

set_server fsync=on
commits() { # commits CLIENTS: $tps, $p50 and $p99 of a one-row transaction, in milliseconds
  rm -f "$stage"/latency.*
  (cd "$stage" && pg -c "$1" -j 2 -T "$seconds" -M prepared -f "$stage/insert.sql" -l --log-prefix="$stage/latency")
  tps="$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' "$stage/pgbench.log")"
  cat "$stage"/latency.* | cut -d ' ' -f 3 | sort -n >"$stage/sorted"
  local count
  count="$(wc -l <"$stage/sorted")"
  p50="$(calc "$(sed -n "$((count / 2 + 1))p" "$stage/sorted") / 1000")" p99="$(calc "$(sed -n "$((count * 99 / 100 + 1))p" "$stage/sorted") / 1000")"
  tps="$(printf %.0f "$tps")"
}
standby() { # standby NAME: the server waits for it from now on
  set_server synchronous_standby_names="$1"
  for turn in $(seq 100); do
    if [ "$(value "SELECT count(*) FROM pg_stat_replication WHERE application_name = '$1' AND sync_state = 'sync'")" = 1 ]; then return; fi
    sleep 0.1
  done
  fail "$1 is no synchronous standby"
}
synchronous=()
measure() { # measure WHO: rows of commits that wait for it
  local clients
  for clients in 1 8 32; do
    commits "$clients"
    say "$1, $clients clients: $tps commits/s, p50 $p50 ms, p99 $p99 ms"
    synchronous+=("$(row "$1" "$clients" "$tps" "$p50" "$p99")")
  done
}
measure_commits() {
  measure 'no standby is waited for'
  value "SELECT pg_create_physical_replication_slot('receive')" >/dev/null
  as mkdir "$stage/receive"
  ${prefix[@]+"${prefix[@]}"} pg_receivewal -d "host=127.0.0.1 port=$port user=postgres application_name=receivewal" -D "$stage/receive" -S receive --synchronous --no-loop >"$stage/receive.log" 2>&1 &
  pid=$!
  background+=("$pid")
  standby receivewal
  measure '`pg_receivewal --synchronous`'
  set_server synchronous_standby_names=
  kill -INT "$pid"
  wait "$pid" 2>/dev/null || true
  agent 'durability = "repository"'
  standby walden
  measure 'walden, `durability = "repository"`'
  set_server synchronous_standby_names=
  forget
  agent 'durability = "spool"'
  standby walden
  measure 'walden, `durability = "spool"`'
  set_server synchronous_standby_names=
  forget
}
if wanted commits; then measure_commits; fi

heading() { printf '\n%s\n\n' "$*"; }

printf '\n%s, %s cores, %s, %s; quiet is 100 one-row commits a second, busy pgbench at %s transactions a second; %s s each, median of %s (of the largest, the largest)\n' \
  "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$(postgres --version)" "$("$stage/walden" --version)" "$rate" "$seconds" "$runs"
if wanted rpo; then
  heading "What would be lost:"
  row 'load, WAL' tail_interval 'RPO p50 s' 'RPO p99 s' 'RPO max s' 'agent CPU s' 'against off'
  echo '| --- | ---: | ---: | ---: | ---: | ---: | ---: |'
  printf '%s\n' "${table[@]}"
fi
if wanted requests; then
  heading "Requests a second to S3, and what a day of them costs:"
  row load tail_interval 'PUT piece' 'PUT coverage' 'PUT lease' 'PUT other' LIST 'GET, HEAD' DELETE all 'USD a day'
  echo '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |'
  printf '%s\n' "${requests[@]}"
fi
if wanted commits; then
  heading "One-row transactions, fsync on, everything on one file system:"
  row 'who is waited for' clients 'commits/s' 'p50 ms' 'p99 ms'
  echo '| --- | ---: | ---: | ---: | ---: |'
  printf '%s\n' "${synchronous[@]}"
fi
