#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=2:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=%x-%j.out
#
# Evaluates MODEL, a model folder or Hub name, by zero-shot classification and retrieval. To wait for the job that
# trains it, whose number $JOB is:
#
#   MODEL=runs/h14/model bash slurm/evaluate.sh --dependency=afterok:$JOB -- --json

MODEL=${MODEL:-runs/h14_laion2b/model}
ZERO_SHOT=${ZERO_SHOT:-data/imagenet1k_val}
RETRIEVAL=${RETRIEVAL:-}
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/ddp.yaml}

source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || submit '' "$0" "$@"
launch flipscale.cli evaluate "$MODEL" \
  ${ZERO_SHOT:+--zero_shot "$ZERO_SHOT"} ${RETRIEVAL:+--retrieval "$RETRIEVAL"} "$@"
