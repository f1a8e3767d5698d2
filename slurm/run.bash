# Sourced by pretrain.sh, tune.sh, evaluate.sh and study.sh: a frozen recipe, a launcher on each node, stop and requeue.

# What a site sets once, here or in the environment of sbatch.
PYTHON=${PYTHON:-python}            # of the environment that flipscale is installed in
LAUNCHER=${LAUNCHER:-accelerate}    # or torchrun, which knows no launch file: plain data parallel
# How a job that was told to stop goes on. `sbatch` submits another one, where jobs may not requeue themselves: what waits
# for the first by --dependency then starts too early. `no` leaves it to you.
REQUEUE=${REQUEUE:-scontrol}
MAX_CRASHES=${MAX_CRASHES:-3}       # without a new checkpoint; preemptions, time limits and dead nodes do not count
CONTAINER=${CONTAINER:-}            # an image that holds PYTHON; none by default
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-apptainer} # or pyxis: srun --container-image

# What Slurm gave this job: processes and cores of a node.
per_node=${SLURM_GPUS_ON_NODE:-1}
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}

find_package='from importlib.util import find_spec; print(find_spec("flipscale").submodule_search_locations[0])'

set -euo pipefail
say() { echo "$(date '+%F %T') $*" >&2; }
fail() { say "error: $*"; exit 2; }

# Copies recipe $2, a file or the name of one of flipscale's, into folder $1 once, and prints the path of the copy.
freeze() {
  local copy file=$2 package=flipscale
  copy=$1/$(basename "$2" .yaml).yaml
  if [ ! -e "$copy" ]; then
    # Without a checkout here, the recipes are those of the installed package. It is found without importing torch.
    [ -d "$package" ] || package=$("$PYTHON" -c "$find_package" 2> /dev/null) || true
    [ -e "$file" ] || file=$package/recipes/$2.yaml
    [ -e "$file" ] || fail "recipe '$2' is neither a file nor one of flipscale/recipes"
    mkdir -p "$1" && cp "$file" "$copy.partial" && mv "$copy.partial" "$copy"
  fi
  echo "$copy"
}

# Outside of a job: submits script $2 and prints the job's number. The recipes that variable $1 names are copied, so
# that no later edit reaches the job. The words up to `--` are sbatch's, the others the job's.
submit() {
  local variable=$1 script=$2 folder options=() recipe frozen=()
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1") && shift; done
  [ $# -eq 0 ] || shift
  if [ -n "$variable" ]; then
    folder=$RUN/slurm/$(date +%Y%m%d-%H%M%S)-$$
    for recipe in ${!variable}; do
      recipe=$(freeze "$folder" "$recipe")
      frozen+=("$recipe")
    done
    export RUN "$variable=${frozen[*]}"
  fi
  [ "$variable" != RECIPES ] || options=("--array=0-$((${#frozen[@]} - 1))" "${options[@]}")
  exec sbatch --parsable --export=ALL "${options[@]}" "$script" "$@"
}

# Runs the Python module $1 with the arguments that follow: on every node a launcher, a process for each of its GPUs.
# Their output goes to `node_log` where that is set.
launch() {
  local address port launcher srun
  address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
  export FLIPSCALE_NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * per_node)) # the trainer refuses to run with fewer
  export SRUN_CPUS_PER_TASK=$cores OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + per_node - 1) / per_node))}
  export PYTHONFAULTHANDLER=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Seconds that a rank has to save when it is told to end, and that one waits whose neighbour is dead.
  export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}
  case $LAUNCHER in
    accelerate)
      launcher=(-m accelerate.commands.launch --config_file "$LAUNCH_FILE" --num_machines "$SLURM_JOB_NUM_NODES"
        --num_processes "$FLIPSCALE_NUM_PROCESSES" --machine_rank NODE_RANK
        --main_process_ip "$address" --main_process_port "$port") ;;
    torchrun)
      [ "$LAUNCH_FILE" = ds_configs/ddp.yaml ] || fail "LAUNCHER=torchrun cannot read $LAUNCH_FILE; use accelerate"
      launcher=(-m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$per_node"
        --node_rank NODE_RANK --master_addr "$address" --master_port "$port")
      export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16} ;;
    *) fail "LAUNCHER is '$LAUNCHER'; use accelerate or torchrun" ;;
  esac
  launcher=("$PYTHON" "${launcher[@]}" -m "$@")
  # One rank's failure ends the others: --kill-on-bad-exit. Only the node itself knows NODE_RANK.
  srun=(srun --kill-on-bad-exit=1 --wait=60 --open-mode=append ${node_log:+--output="$node_log"})
  case ${CONTAINER:+$CONTAINER_RUNTIME} in
    '') ;;
    apptainer) launcher=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER" "${launcher[@]}") ;;
    pyxis) srun+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
    *) fail "CONTAINER_RUNTIME is '$CONTAINER_RUNTIME'; use apptainer or pyxis" ;;
  esac
  "${srun[@]}" bash -c 'exec "${@//NODE_RANK/$SLURM_NODEID}"' launcher "${launcher[@]}"
}

# Trains RECIPE in RUN with the flags given, and ends this script: done, or failed, or requeued to go on.
train() {
  local stopping='' ending='' pid rc=0
  RECIPE=$(freeze "$RUN/slurm/$SLURM_JOB_ID" "$RECIPE")
  node_log=$RUN/slurm/%j-%N.log
  export RECIPE RUN FLIPSCALE_STOP_FILE=$RUN/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.stop
  say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $RECIPE in $RUN on $SLURM_JOB_NODELIST; output: $node_log"
  # The early warning: the end of the time or a preemption. Processes that do not exist yet miss a signal, not a file.
  # Never trap CONT, which Slurm sends along: bash would lose the USR1.
  trap 'stopping=1; say "told to stop: saving"; : > "$FLIPSCALE_STOP_FILE"' USR1
  # The end: scancel, or what Slurm requeues by itself. It has told the processes too.
  trap 'ending=1; say "told to end"' TERM
  # A core of each process is its own, the others decode.
  launch flipscale.pretrain --config "$RECIPE" --output_dir "$RUN" \
    --data.num_workers $((cores / per_node > 1 ? cores / per_node - 1 : 0)) "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap cuts a wait short
  wait "$pid" || rc=$?
  rm -f "$FLIPSCALE_STOP_FILE"
  [ -z "$ending" ] || exit "$((rc ? rc : 1))"
  [ ! -e "$FLIPSCALE_STOP_FILE.refused" ] || fail "not restarted: see the end of the output for what to change"
  [ "$rc" = 0 ] || crashed "$rc" || exit "$rc"
  [ "$rc" != 0 ] || [ -n "$stopping" ] || exit 0
  requeue "$@"
}

# Counts a crash with exit code $1; false where more than MAX_CRASHES came since the run's newest checkpoint.
crashed() {
  local newest count
  newest=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
  newest=${newest:-start}
  echo "$newest job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} exit $1 $(date '+%F %T')" >> "$RUN/slurm/crashes"
  count=$(grep -c "^$newest " "$RUN/slurm/crashes")
  say "crash $count since $newest (exit code $1); at most $MAX_CRASHES are restarted"
  [ "$count" -le "$MAX_CRASHES" ]
}

# Ends this script with the job queued again, as REQUEUE says.
requeue() {
  local state preempted
  read -r state preempted < <(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=State,PreemptTime)
  [ "$state" = RUNNING ] || exit 1 # cancelled just now: it must stay so
  case $preempted in N/A | '') ;; *) say "preempted: Slurm requeues" && exit 0 ;; esac
  case $REQUEUE in
    scontrol)
      say "requeue"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 600 & wait ;; # until the requeue ends this script
    sbatch)
      local limit options
      limit=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)
      options=(--job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_JOB_NUM_NODES"
        --gpus-per-node="$per_node" --cpus-per-task="$cores" --time="$limit"
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
      say "submitted again: $(sbatch --parsable --export=ALL "${options[@]}" "$0" "$@")" ;;
    no) say "not done: submit it again to go on" && exit 75 ;;
    *) fail "REQUEUE is '$REQUEUE'; use scontrol, sbatch or no" ;;
  esac
}
