#!/bin/bash
# start.sh RUN [options of train.py]: begin or go on, pinned to core 1, detached; the log is RUN.out
here=$(cd "$(dirname "$0")" && pwd)
cd /var/tmp/densedino-default-weights || exit 1
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
setsid nohup taskset -c 1 nice -n 2 /opt/dd/bin/python "$here/train.py" "$@" >> "$1.out" 2>&1 &
echo $! | tee "$1.pid"
