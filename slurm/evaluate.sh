#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=%x-%j.out
#
# Evaluates MODEL on the tasks of SUITE, whose data `flipscale prepare tasks` has put into TASKS. If ZERO_SHOT or
# RETRIEVAL is set, it evaluates on these folders instead. MODEL is a model folder or a Hub name. MODEL, ZERO_SHOT and
# RETRIEVAL may have several words. Each node starts a process for each GPU, and all processes share the images of each
# task. A requeued job continues with the unfinished task. To wait for job $JOB, which trains the model:
#
#   MODEL=runs/h14/model SUITE=robustness bash slurm/evaluate.sh --dependency=afterok:$JOB -- --json

MODEL=${MODEL:-runs/h14_laion2b/model}
ZERO_SHOT=${ZERO_SHOT:-}
RETRIEVAL=${RETRIEVAL:-}
TASKS=${TASKS:-data/tasks}
SUITE=${SUITE:-paper}
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/ddp.yaml}

[ "${0##*/}" = slurm_script ] || SLURM_SUBMIT_DIR=. # a shell of another job, as of salloc
source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
what=()
read -r -d '' -a folders <<< "$ZERO_SHOT" || [ ${#folders[@]} = 0 ] || what+=(--zero_shot "${folders[@]}")
read -r -d '' -a folders <<< "$RETRIEVAL" || [ ${#folders[@]} = 0 ] || what+=(--retrieval "${folders[@]}")
[ ${#what[@]} -gt 0 ] || what=(--tasks "$TASKS" --suite "$SUITE")
read -r -d '' -a models <<< "$MODEL" || true
# A job that this one waits for may write the models, which are then not looked up.
check() { [ -z "$pending" ] || models=("${models[@]/#/pending:}"); checked evaluate "${models[@]}" "${what[@]}" "$@" --dry_run; }
[ -n "${SLURM_JOB_ID:-}" ] || submit '' "$0" "$@"
launch flipscale.cli evaluate "${models[@]}" "${what[@]}" "$@"
