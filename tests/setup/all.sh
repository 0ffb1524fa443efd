#!/usr/bin/env bash
# all.sh [full]: everything that `make test` needs, and with `full` what `make test-full` needs as well.
. "$(dirname "$0")/lib.sh"
here="$project/tests/setup"
"$here/tools.sh" lz4 zstd strace openssl
"$here/postgres.sh" full >/dev/null
if [ "${1:-}" = full ]; then
  "$here/postgres.sh" 13 14 15 16 17 18 >/dev/null
else
  "$here/postgres.sh" 13 15 17 18 >/dev/null
fi
"$here/s3.sh"
"$here/tools.sh" promtool=prometheus
