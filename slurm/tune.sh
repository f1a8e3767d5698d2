#!/bin/bash
#SBATCH --job-name=tune
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes # cancelled when the job it depends on fails
#SBATCH --output=%x-%j.out
#
# Tunes the model of the finished run FROM on the data of RECIPE in the run directory RUN, with STAGES instead of the
# stages of the recipe. Submit it like pretrain.sh; the comment there shows how to make it wait for FROM:
#
#   RECIPE=h14_laion2b FROM=runs/h14 RUN=runs/h14_336 bash slurm/tune.sh -- --model.vision_config.image_size 336

RECIPE=${RECIPE:-h14_laion2b}
FROM=${FROM:-runs/$(basename -- "$RECIPE" .yaml)}
RUN=${RUN:-${FROM%/}_tuned}
# Unmasked, 128 M pairs, as in the paper's Table 10.
STAGES=${STAGES:-'[{name: unmasked tuning, samples: 128_000_000, base_lr: 4.0e-8, warmup_samples: 25_600_000}]'}
case $(basename -- "$RECIPE") in h14*) engine=hsdp ;; *) engine=ddp ;; esac
[ "${LAUNCHER:-accelerate}" = accelerate ] || engine=ddp
LAUNCH_FILE=${LAUNCH_FILE:-ds_configs/$engine.yaml}

[ "${0##*/}" = slurm_script ] || SLURM_SUBMIT_DIR=. # a shell of another job, as of salloc
source "${SLURM_SUBMIT_DIR:-.}/slurm/run.bash" || exit 2
flags=(--model.init_from "$FROM/model" --stages "$STAGES")
check() { check_recipes --output_dir "$RUN" "${flags[@]}" "$@"; }
[ -n "${SLURM_JOB_ID:-}" ] || submit RECIPE "$0" "$@"
train "${flags[@]}" "$@"
