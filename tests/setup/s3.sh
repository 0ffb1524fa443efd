#!/usr/bin/env bash
# s3.sh: moto, an S3 server that honours conditional writes, in a Python environment of its own (.cache/venv).
. "$(dirname "$0")/lib.sh"
lock
moto='moto[server,s3]==5.2.5'
python_environment venv "$moto"
link "$cache/venv/bin/moto_server"
