#!/bin/bash
#SBATCH --job-name=study
#SBATCH --array=0-1            # one task for each run; bash counts them
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
# Trains the unfinished runs of a planned study, each in a task of an array. If a run fails, the others go on. The same
# command submits the missing runs again; they wait for the study's jobs in the queue. At most two runs at a time:
#
#   flipscale study plan masks.yaml --output_dir runs/masks
#   STUDY=runs/masks bash slurm/study.sh --array=0-5%2
#
# With RECIPES, trains these recipes with the same flags, each in a run directory of its name in STUDY:
#
#   RECIPES="l16_laion400m l16_laion400m_clip" STUDY=runs/mask bash slurm/study.sh --array=0-1%2 -- --seed 1

STUDY=${STUDY:-runs/study}
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/ddp.yaml}

[ "${0##*/}" = slurm_script ] || SLURM_SUBMIT_DIR=. # a shell of another job, as of salloc
source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
check() { check_recipes --output_dir "$STUDY/none" "$@"; } # each has its own folder
if [ -z "${SLURM_JOB_ID:-}" ]; then
  RUN=$STUDY
  options=()
  if [ -z "${RECIPES:-}" ]; then
    export PLANNED_RUNS=$STUDY/runs
    for recipe in "$PLANNED_RUNS"/*.yaml; do
      [ -e "$recipe" ] || fail "STUDY '$STUDY' has no runs; plan them with flipscale study plan, or name RECIPES"
      [ -e "${recipe%.yaml}/DONE" ] || RECIPES+="$recipe "
    done
    [ -n "${RECIPES:-}" ] || { say "all runs of $STUDY are done" && exit 0; }
    # Jobs in the queue come first, because a run that they finish is not trained again.
    name=${STUDY%/}
    name=study-${name//\//-}
    queued=$(squeue --noheader --me --name="$name" --format=%F | sort -u | paste -sd :)
    options=(--job-name="$name" ${queued:+--dependency="afterany:$queued"})
  fi
  submit RECIPES "$0" "${options[@]}" "$@"
fi
read -r -d '' -a recipes <<< "$RECIPES" || true
RECIPE=${recipes[$SLURM_ARRAY_TASK_ID]:?study.sh: --array has more tasks than RECIPES has words}
RUN=${PLANNED_RUNS:-$STUDY}/$(basename -- "$RECIPE" .yaml)
[ ! -e "$RUN/DONE" ] || exit 0
train "$@"
