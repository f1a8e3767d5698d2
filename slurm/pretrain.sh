#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1    # one launcher on each node; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive            # all cores of a node
#SBATCH --mem=0                # all of its memory: loader workers and page-locked batches need it
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300    # this many seconds before the time limit, save and requeue
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out     # of this script; each node's processes write to a file in RUN/slurm
#
# Pre-trains RECIPE in the run directory RUN, and continues after time limits, preemptions, dead nodes and crashes.
# Submit it from the folder that holds slurm/ and ds_configs/ (a checkout, or where `flipscale launch_files` wrote
# them). Words before `--` are options of sbatch, words after it are flags of `flipscale pretrain`:
#
#   RECIPE=h14_laion2b bash slurm/pretrain.sh --partition=gpu -- --optim.weight_decay 0.1
#
# This checks the recipe, the flags, LAUNCH_FILE and the number of processes by `flipscale check`, and copies the recipe.
# A plain sbatch works too. It checks nothing, and the recipe is copied when the job first starts:
#
#   RECIPE=h14_laion2b sbatch slurm/pretrain.sh --seed 1
#
# To pre-train, tune and evaluate, one after the other:
#
#   first=$(RECIPE=h14_laion2b RUN=runs/h14 bash slurm/pretrain.sh)
#   tuned=$(RECIPE=h14_laion2b FROM=runs/h14 RUN=runs/h14_tuned bash slurm/tune.sh --dependency=afterok:$first)
#   MODEL=runs/h14_tuned/model bash slurm/evaluate.sh --dependency=afterok:$tuned
#
# `flipscale status runs/h14` prints the progress. What a site sets once is at the top of run.bash.

RECIPE=${RECIPE:-h14_laion2b}
RUN=${RUN:-runs/$(basename -- "$RECIPE" .yaml)}
# H/14's weights and moments are sharded within a node; smaller models are whole on each GPU.
case $(basename -- "$RECIPE") in h14*) engine=hsdp ;; *) engine=ddp ;; esac
[ "${LAUNCHER:-accelerate}" = accelerate ] || engine=ddp
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/$engine.yaml}

[ "${0##*/}" = slurm_script ] || SLURM_SUBMIT_DIR=. # a shell of another job, as of salloc
source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
check() { check_recipes --output_dir "$RUN" "$@"; }
[ -n "${SLURM_JOB_ID:-}" ] || submit RECIPE "$0" "$@"
train "$@"
