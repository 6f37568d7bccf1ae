#!/bin/sh
# Runs a command in a SLURM job. If the command leaves with status 75 (SIGTERM
# came and the state is saved, see dmdd_jax/launch/preemption.py), the job is
# queued again.
#
# Experimental: tested with a stand-in for scontrol, never run in SLURM.
#
#   sbatch --array=0-14 --requeue --open-mode=append --signal=B:TERM@120 \
#     tools/requeue.sh .venv/bin/python tools/run_categories.py --config ...
#
# `B:` sends SIGTERM to this shell, which passes it on. With srun, leave `B:` out
# (--signal=TERM@120): SLURM then sends SIGTERM to the tasks of srun itself.
trap 'kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # The trap ends the wait.
  wait "$child"
  status=$?
done
if [ "$status" = 75 ]; then
  job="${SLURM_JOB_ID:?status 75, and this is no SLURM job}"
  scontrol requeue "$job"
fi
exit "$status"
