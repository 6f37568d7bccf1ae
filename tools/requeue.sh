#!/bin/sh
# Runs a command in a SLURM job, which is queued again where it leaves with
# status 75: SIGTERM came, and what there is is saved (dmdd_jax/launch/preemption.py).
#
#   sbatch --array=0-14 --requeue --open-mode=append --signal=B:TERM@120 \
#     tools/requeue.sh .venv/bin/python tools/run_categories.py --config ...
#
# SIGTERM to this shell, which is what `B:` asks for, is passed on. Before srun,
# ask for --signal=TERM@120: SLURM then tells srun's tasks by itself.
trap 'kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # The trap has ended the wait.
  wait "$child"
  status=$?
done
if [ "$status" = 75 ]; then
  job="${SLURM_JOB_ID:?status 75, and this is no SLURM job}"
  scontrol requeue "$job"
fi
exit "$status"
