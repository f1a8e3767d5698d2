#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1    # a launcher on each node, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96     # all of a node's
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300    # this many seconds before the end: save, then go to the queue again
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out     # this script's; the processes' is in RUN/slurm, a file for each node
#
# Pre-trains RECIPE in the run directory RUN and goes on after time limits, preemptions, dead nodes and crashes.
# From the root of the repository; words before `--` are sbatch's, those after it flags of `flipscale pretrain`:
#
#   RECIPE=h14_laion2b bash slurm/pretrain.sh --partition=gpu -- --optim.weight_decay 0.1
#
# submits it with the recipe as it is now. `RECIPE=h14_laion2b sbatch slurm/pretrain.sh --seed 1` works too, with
# the recipe as it is when the job first starts. Pre-train, tune and evaluate, one after the other:
#
#   first=$(RECIPE=h14_laion2b RUN=runs/h14 bash slurm/pretrain.sh)
#   tuned=$(RECIPE=h14_laion2b FROM=runs/h14 RUN=runs/h14_tuned bash slurm/tune.sh --dependency=afterok:$first)
#   MODEL=runs/h14_tuned/model bash slurm/evaluate.sh --dependency=afterok:$tuned
#
# `flipscale status runs/h14` tells how far it is; what a site sets once is at the top of run.bash.

RECIPE=${RECIPE:-h14_laion2b}
RUN=${RUN:-runs/$(basename "$RECIPE" .yaml)}
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/ddp.yaml}

source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit RECIPE "$0" "$@"
train "$@"
