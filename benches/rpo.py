#!/usr/bin/env python3
"""Samples what would be lost if the host burned now: rpo.py FOLDER SEGMENT_BYTES SECONDS PSQL...

FOLDER is the cluster's folder in a local repository. About a hundred times a second the server is asked how far its WAL is flushed,
then the repository is looked at: whole segments by name, then the open segment's pieces without a hole. The figure is the age of the
oldest byte that was flushed and is not in the repository (0 when there is none), so nothing that the agent says about itself is in it.
Prints p50, p99 and the largest, in seconds, and the WAL written in MiB."""
import os
import subprocess
import sys
import time
from collections import deque

folder, segment_bytes, seconds, psql = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
server = subprocess.Popen(psql, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def flushed():
    server.stdin.write("SELECT pg_current_wal_flush_lsn();\n")
    server.stdin.flush()
    high, low = server.stdout.readline().strip().split("/")
    return int(high, 16) << 32 | int(low, 16)


def name(start):
    number = start // segment_bytes
    per_id = (1 << 32) // segment_bytes
    return "%08X%08X%08X" % (1, number // per_id, number % per_id)


def stored(start):
    """The end of what is there from the segment at `start` on, and the first segment that is not there whole."""
    while os.path.exists(f"{folder}/wal/00000001/{name(start)}.lz4"):
        start += segment_bytes
    try:
        pieces = [piece[:17].split("-") for piece in os.listdir(f"{folder}/tail/00000001/{name(start)}")]
    except FileNotFoundError:
        pieces = []
    end = 0
    for first, last in sorted((int(first, 16), int(last, 16)) for first, last in (p for p in pieces if len(p) == 2)):
        if first > end:
            break
        end = max(end, last)
    return start + end, start


begin = flushed()
waiting, ages, open_segment = deque(), [], begin // segment_bytes * segment_bytes
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    at = time.monotonic()
    end = flushed()
    if not waiting or end > waiting[-1][1]:
        waiting.append((at, end))
    held, open_segment = stored(open_segment)
    while waiting and waiting[0][1] <= held:
        waiting.popleft()
    now = time.monotonic()
    ages.append(now - waiting[0][0] if waiting else 0.0)
    time.sleep(max(0.0, at + 0.01 - time.monotonic()))
ages.sort()
share = lambda percent: ages[min(len(ages) - 1, len(ages) * percent // 100)]
print("%.3f %.3f %.3f %d" % (share(50), share(99), ages[-1], (flushed() - begin) >> 20))
server.stdin.close()
server.wait()
