#!/bin/bash
#SBATCH --job-name=prepare
#SBATCH --array=0-7            # tasks that share the work
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96     # all cores of a node
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60     # this many seconds before the time limit, stop and requeue
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out  # of this script; each node's processes write to a file in TO.prepare
#
# Runs `flipscale prepare` with the verb WHAT (embed, resize, weights or audit): reads SHARDS, and writes the folder TO.
# It continues after time limits, preemptions, dead nodes and crashes, and the result has the same bytes. All tasks of
# the array, and all nodes of a task, share the shards of embed and resize. One task makes weights or an audit, on all
# cores of a node; if it ends early, another takes its place. Words before `--` are options of sbatch, words after it are
# flags of `flipscale prepare`:
#
#   WHAT=resize SHARDS='laion/{00000..41407}.tar' TO=laion_288 bash slurm/prepare.sh --array=0-31 -- --short_side 288
#   WHAT=embed SHARDS=laion_288 TO=teacher bash slurm/prepare.sh --gpus-per-node=8 -- --model runs/h14/model
#   WHAT=weights SHARDS=laion_288 TO=weights bash slurm/prepare.sh --array=0-1 -- --caption_counts --power 0.5
#   WHAT=audit SHARDS=laion_288 TO=audit bash slurm/prepare.sh --array=0-1 -- --tests data/tasks

WHAT=${WHAT:-resize}
SHARDS=${SHARDS:-}
TO=${TO:-}
LAUNCHER=torchrun
LAUNCH_FILE=ds_configs/ddp.yaml # torchrun reads none
[ "$WHAT" = embed ] || LAUNCHER=none

[ "${0##*/}" = slurm_script ] || SLURM_SUBMIT_DIR=. # a shell of another job, as of salloc
source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
case $WHAT in embed | resize | weights | audit) ;; *) fail "WHAT is '$WHAT'; use embed, resize, weights or audit" ;; esac
[ -n "$SHARDS" ] || fail "SHARDS is empty; name the shards, such as 'laion/{00000..41407}.tar'"
[ -n "$TO" ] || fail "TO is empty; name the folder to write"
check() { :; }
[ -n "${SLURM_JOB_ID:-}" ] || submit '' "$0" "$@"
prepare "$@"
