#!/bin/bash
#SBATCH --job-name=study
#SBATCH --array=0-1            # one task for each of RECIPES
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
# Pre-trains each of RECIPES in a run directory named after it in STUDY, all with the same flags. At most two at a time:
#
#   RECIPES="l16_laion400m l16_laion400m_clip" STUDY=runs/mask bash slurm/study.sh --array=0-1%2 -- --seed 1

RECIPES=${RECIPES:-l16_laion400m l16_laion400m_clip}
STUDY=${STUDY:-runs/study}
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/ddp.yaml}

source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
if [ -z "${SLURM_JOB_ID:-}" ]; then
  RUN=$STUDY
  submit RECIPES "$0" "$@"
fi
read -r -d '' -a recipes <<< "$RECIPES" || true
RECIPE=${recipes[$SLURM_ARRAY_TASK_ID]:?study.sh: --array has more tasks than RECIPES has words}
RUN=$STUDY/$(basename -- "$RECIPE" .yaml)
train "$@"
