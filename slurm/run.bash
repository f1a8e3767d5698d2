# Functions of pretrain.sh, tune.sh, evaluate.sh, study.sh and prepare.sh, which source this file: freeze the recipe,
# start a launcher on each node, stop and requeue.

# Settings of a site. Set them here or in the environment of sbatch.
PYTHON=${PYTHON:-python}            # the Python that has flipscale
LAUNCHER=${LAUNCHER:-accelerate}    # or torchrun, which reads no launch file: plain data parallelism
# How a stopped job continues. `scontrol` requeues it. `sbatch` submits a new job, for sites that forbid a requeue; jobs
# that depend on the first job (--dependency) then start too early, and it loses options such as --constraint that
# are no #SBATCH lines. `no` leaves it to you.
REQUEUE=${REQUEUE:-scontrol}
# Restarts of what was submitted, after crashes without a new checkpoint; other ends do not count. The first restart is on
# the same nodes, without Slurm's wait for a requeue of two minutes. The others are requeued, as a node may be at fault.
MAX_CRASHES=${MAX_CRASHES:-3}
CONTAINER=${CONTAINER:-}            # an image that has PYTHON; by default none
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-apptainer} # or pyxis: srun --container-image

# Slurm calls its copy of a job's script slurm_script. A shell of another job, such as salloc's, submits as others do,
# and that job's variables are not for the new one.
if [ "${0##*/}" != slurm_script ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
fi
# Processes and cores of each node, from Slurm.
per_node=${SLURM_GPUS_ON_NODE:-1}
# Nodes may differ, and Slurm refuses a step that asks for more than the smallest has.
cores=$(tr , '\n' <<< "${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}" | sort -n | head -n 1)
cores=${SLURM_CPUS_PER_TASK:-${cores%(*}}

find_package='from importlib.util import find_spec; print(find_spec("flipscale").submodule_search_locations[0])'

set -euo pipefail
shopt -s inherit_errexit # a failure within $( ) ends the script
# The option --help prints the script's comment, and the variables of both files with their defaults.
for word; do
  case ${SLURM_JOB_ID:+--}$word in
    --) break ;;
    -h | --help)
      sed -n '/^#$/,/^$/s/^# \{0,1\}//p' "$0"
      sed -n 's/^\([A-Z_]*\)=\${[A-Z_]*:-\(.*\)}\( *#.*\)\{0,1\}$/\1=\2\3/p' "$0" "${BASH_SOURCE[0]}"
      exit 0 ;;
  esac
done
say() { echo "$(date '+%F %T') $*" >&2; }
fail() { say "error: $*"; exit 2; }
case $LAUNCHER in accelerate | torchrun | none) ;; *) fail "LAUNCHER is '$LAUNCHER'; use accelerate or torchrun" ;; esac
case $REQUEUE in scontrol | sbatch | no) ;; *) fail "REQUEUE is '$REQUEUE'; use scontrol, sbatch or no" ;; esac
case ${CONTAINER:+$CONTAINER_RUNTIME} in '' | apptainer | pyxis) ;;
  *) fail "CONTAINER_RUNTIME is '$CONTAINER_RUNTIME'; use apptainer or pyxis" ;; esac
if [ "$LAUNCHER" = accelerate ]; then
  [ -e "$LAUNCH_FILE" ] || fail "LAUNCH_FILE '$LAUNCH_FILE' does not exist; 'flipscale launch_files .' writes ds_configs/"
else
  [ "$LAUNCH_FILE" = ds_configs/ddp.yaml ] || fail "LAUNCHER=$LAUNCHER cannot read $LAUNCH_FILE; use accelerate"
fi

# Prints the file of recipe $1, which is a file or the name of one of flipscale's.
find_recipe() {
  local file=$1 package=flipscale
  # Without a checkout here, the recipes are those of the installed package. It is found without importing torch.
  [ -d "$package" ] || package=$("$PYTHON" -c "$find_package" 2> /dev/null) || true
  [ -e "$file" ] || file=$package/recipes/$1.yaml
  [ -e "$file" ] || fail "recipe '$1' is neither a file nor one of flipscale/recipes"
  echo "$file"
}

merge_recipe='
import sys
from flipscale.recipe.files import read_recipes
from flipscale.recipe.recipe import Recipe
from flipscale.process.console import report_user_errors
with report_user_errors():
    print(read_recipes([sys.argv[1]], Recipe), end="")'

# Copies recipe $2 into folder $1 once, merged into the recipes that it extends, and prints the path of the copy. A
# machine without flipscale, which CONTAINER then has, cannot merge them: prints $2, which the job then reads.
freeze() {
  local copy file why='' rc=0
  copy=$1/$(basename -- "$2" .yaml).yaml
  if [ ! -e "$copy" ]; then
    file=$(find_recipe "$2")
    mkdir -p -- "$1"
    if grep -q '^extends:' -- "$file"; then
      why=$("$PYTHON" -c "$merge_recipe" "$file" 2>&1 > "$copy.partial") || rc=$?
      why=$(tail -n 1 <<< "$why")
      [ "$rc" != 2 ] || fail "${why#flipscale: error: }"
      if [ "$rc" != 0 ]; then
        say "recipe $2 is not copied, so the job reads it as it is then: $why"
        rm -- "$copy.partial"
        echo "$2" && return
      fi
    else
      cp -- "$file" "$copy.partial"
    fi
    mv -- "$copy.partial" "$copy"
  fi
  echo "$copy"
}

# Prints the last value of sbatch's option --$1 or -$2 among the words that follow.
asked() {
  local name=$1 letter=$2 value='' before='' word
  shift 2
  for word; do
    case $before in "--$name" | "-$letter") value=$word ;; esac
    case $word in "--$name="*) value=${word#*=} ;; "-$letter"?*) value=${word#-?} ;; esac
    before=$word
  done
  echo "$value"
}

# Checks a submission by `flipscale` with the words given. Refuses only what flipscale refuses, because this machine may
# lack the package, which CONTAINER then has, or the network.
checked() {
  local printed rc=0
  printed=$("$PYTHON" -m flipscale.cli "$@" 2>&1) || rc=$?
  printed=$(tail -n 1 <<< "$printed")
  [ "$rc" != 2 ] || fail "not submitted: ${printed#flipscale: error: }"
  [ "$rc" = 0 ] || say "submitted without a check by $PYTHON -m flipscale.cli: ${printed:-exit code $rc}"
}

# Checks the recipes `recipes` with the flags given, on the nodes and GPUs that the words `options` ask for.
check_recipes() {
  local nodes gpus other=' (--gpus|--gpus-per-(task|socket)|-G)[= 0-9]' world=() recipe file files=()
  nodes=$(asked nodes N "${options[@]}")
  gpus=$(asked gpus-per-node _ "${options[@]}")
  [ -n "$gpus" ] || gpus=$(asked gres _ "${options[@]}" | tr , '\n' | grep '^gpu:') || true
  gpus=${gpus##*:}
  if [[ $nodes =~ ^[0-9]+$ && $gpus =~ ^[0-9]+$ && ! " ${options[*]}" =~ $other ]]; then
    world=(--num_processes "$((nodes * gpus))" --num_machines "$nodes")
    [ "$LAUNCHER" != accelerate ] || world+=(--launch_file "$LAUNCH_FILE")
  else
    world=(--num_processes 1) # their number is Slurm's choice
  fi
  for recipe in "${recipes[@]}"; do
    file=$(find_recipe "$recipe")
    files+=("$file")
  done
  checked check --config "${files[@]}" "${world[@]}" ${pending:+--pending} "$@"
}

# Submits script $2 and prints the number of the job. Copies the recipes named in variable $1, so that later edits do
# not reach the job. Of the words that follow, those before `--` go to sbatch and the others to the script. The script's
# function `check` gets the others, and refuses what cannot run.
submit() {
  local variable=$1 script=$2 folder='' first name given=() options=() pending recipe recipes=() frozen=() array limit rc=0
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1") && shift; done
  [ $# -eq 0 ] || shift
  # The options in the script, without comments, then those given.
  read -r -d '' -a options < <(sed -n 's/ #.*//; s/^#SBATCH//p' "$script") || true
  options+=("${given[@]}")
  pending=$(asked dependency d "${options[@]}")
  case $(asked export _ "${options[@]}") in '' | ALL | ALL,*) ;;
    *) fail "--export would drop the variables of this script, such as RECIPE; begin it with ALL, as in --export=ALL,A=1" ;;
  esac
  if [ -n "$variable" ]; then
    recipes=("${!variable}")
    if [ "$variable" = RECIPES ]; then
      array=$(asked array a "${given[@]}")
      [[ $array =~ ^(0-[0-9]+)?(%[0-9]+)?$ ]] ||
        fail "--array '$array' chooses tasks, which follow from the runs; write a limit, as in --array=0-5%2, or RECIPES"
      limit=${BASH_REMATCH[2]}
      # They are told apart by spaces, and by their names in the study.
      case $RUN in *[[:space:]]*) fail "STUDY '$RUN' has a space; name another folder" ;; esac
      read -r -d '' -a recipes <<< "$RECIPES" || true
    fi
    name=$(for recipe in "${recipes[@]}"; do basename -- "$recipe" .yaml; done | sort | uniq -d | head -n 1)
    [ -z "$name" ] || fail "two recipes are called $name; rename one of them"
  fi
  check "$@"
  if [ -n "$variable" ]; then
    folder=$RUN/slurm/$(date +%Y%m%d-%H%M%S)-$$
    first=$folder
    while [ ! -e "$(dirname -- "$first")" ]; do first=$(dirname -- "$first"); done
    for recipe in "${recipes[@]}"; do
      recipe=$(freeze "$folder" "$recipe")
      frozen+=("$recipe")
    done
    export RUN "$variable=${frozen[*]}"
  fi
  # Of an array that is given, the limit after % stays; sbatch takes the last.
  [ "$variable" != RECIPES ] || given+=("--array=0-$((${#frozen[@]} - 1))$limit")
  sbatch --parsable --export=ALL "${given[@]}" "$script" "$@" || rc=$?
  if [ "$rc" != 0 ] && [ -n "$folder" ]; then # a failed submission leaves no folders
    rm -r -- "$folder"
    while [ "$folder" != "$first" ]; do
      folder=$(dirname -- "$folder")
      rmdir -- "$folder" 2> /dev/null || break
    done
  fi
  exit "$rc"
}

# Runs the Python module $1 with the arguments that follow, through a launcher on each node that starts a process for
# each GPU. Their output goes to the file `node_log` if it is set.
launch() {
  local address port launcher srun
  read -r address < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # `head` may end first, which would be a failure
  port=$((20000 + SLURM_JOB_ID % 10000)) # by job, because two jobs may share a node
  export FLIPSCALE_NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * per_node)) # the trainer refuses to start with fewer
  export SRUN_CPUS_PER_TASK=$cores OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + per_node - 1) / per_node))}
  export PYTHONFAULTHANDLER=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Each process stays on the cores near its GPU, and so do its loader workers. torchrun reads no variable for this.
  export ACCELERATE_CPU_AFFINITY=${ACCELERATE_CPU_AFFINITY:-1}
  # Seconds that a rank may take to save after a stop, and that it waits after another rank's death.
  export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}
  case $LAUNCHER in
    accelerate)
      launcher=(-m accelerate.commands.launch --config_file "$LAUNCH_FILE" --num_machines "$SLURM_JOB_NUM_NODES"
        --num_processes "$FLIPSCALE_NUM_PROCESSES" --machine_rank NODE_RANK
        --main_process_ip "$address" --main_process_port "$port") ;;
    torchrun)
      launcher=(-m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$per_node"
        --node_rank NODE_RANK --master_addr "$address" --master_port "$port") ;;
    none) # a process on each node, which starts its own workers
      launcher=() OMP_NUM_THREADS=1
      unset FLIPSCALE_NUM_PROCESSES ;;
  esac
  launcher=(${before[@]+"${before[@]}"} "$PYTHON" ${launcher[@]+"${launcher[@]}"} -m "$@")
  # On each node: kernels are compiled into a folder on its own disk, which all ranks of all nodes would otherwise share
  # in $HOME. It holds code, so one that somebody else has made is left alone. NODE_RANK is known on the node only.
  local on_node='[ -z "${FLIPSCALE_STOP_FILE:-}" ] || echo "--- job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0} on ${SLURMD_NODENAME:-}"
    cache=${SLURM_TMPDIR:-/tmp}/flipscale-$UID
    mkdir -p -m 700 "$cache" && [ -O "$cache" ] || cache=$(mktemp -d)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    for word; do
      shift
      [ "$word" != NODE_RANK ] || word=$SLURM_NODEID
      set -- "$@" "$word"
    done
    exec "$@"'
  # --kill-on-bad-exit ends all ranks when one fails. The first node pushes the model while the others have ended.
  srun=(srun --kill-on-bad-exit=1 --wait=3600 --open-mode=append ${node_log:+--output="$node_log"})
  case ${CONTAINER:+$CONTAINER_RUNTIME} in
    '') ;;
    apptainer) launcher=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER" "${launcher[@]}") ;;
    pyxis) srun+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
  esac
  "${srun[@]}" bash -c "$on_node" launcher "${launcher[@]}"
}

# Trains RECIPE in RUN with the flags given, then ends this script as done, failed, or requeued.
train() {
  RECIPE=$(freeze "$RUN/slurm/$SLURM_JOB_ID" "$RECIPE")
  export RECIPE
  supervise "$RECIPE" flipscale.pretrain --config="$RECIPE" --output_dir="$RUN" -- "$@"
}

# Prepares TO from SHARDS by `flipscale prepare` WHAT with the flags given, then ends this script like `train`.
prepare() {
  TO=${TO%/}
  local words=("$SHARDS" "$TO") before=() take_turns=''
  RUN=$TO.prepare/task-${SLURM_ARRAY_TASK_ID:-0}
  [ "$WHAT" != audit ] || words=("$SHARDS" --output_dir "$TO")
  case $WHAT in
    weights | audit) # a killed task frees the lock, and another then starts
      take_turns='to=$1; shift
        [ -e "$to" ] && [ "$*" = "$(cat "$0" 2> /dev/null)" ] || { "$@" && echo "$*" > "$0"; }'
      before=(flock "$TO.prepare/lock" bash -c "$take_turns" "$TO.prepare/done" "$TO") ;;
  esac
  kills=1 # each file is written aside and renamed
  supervise "$WHAT" flipscale.cli prepare "$WHAT" "${words[@]}" -- "$@"
}

# Runs the Python module $2 for the work $1 in RUN, with the words up to `--` and the flags after it.
supervise() {
  local stopping='' ending='' pid rc=0 what=$1 module=()
  shift
  while [ "$1" != -- ]; do module+=("$1") && shift; done
  shift
  node_log=${RUN//%/%%}/slurm/%j-%N.log
  mkdir -p -- "$RUN/slurm"
  export RUN FLIPSCALE_STOP_FILE=$RUN/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.stop
  export FLIPSCALE_FIRST_JOB=${FLIPSCALE_FIRST_JOB:-$SLURM_JOB_ID} # as submitted; jobs that continue it inherit it
  say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $what in $RUN on $SLURM_JOB_NODELIST; output: $RUN/slurm/$SLURM_JOB_ID-*.log"
  # USR1 warns of the time limit or of a preemption. A file reaches also processes that have not started yet.
  # Do not trap CONT, which Slurm sends as well: bash would lose the USR1.
  trap 'stopping=1; say "told to stop: saving"; : > "$FLIPSCALE_STOP_FILE"; [ -z "${kills:+${pid:-}}" ] || kill "$pid"' USR1
  # TERM comes with scancel, or when Slurm itself requeues the job. The processes have received it too.
  trap 'ending=1; say "told to end"' TERM
  local job=$SLURM_JOB_ID state preempted count
  # The last task of an array has the number of the array, by which all its tasks would be requeued.
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  while :; do
    rc=0
    launch "${module[@]}" "$@" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap interrupts `wait`
    wait "$pid" || rc=$?
    rm -f "$FLIPSCALE_STOP_FILE"
    [ -z "${kills:-}" ] || [ -z "$stopping" ] || rc=0
    [ -z "$ending" ] || exit "$((rc ? rc : 1))"
    [ ! -e "$FLIPSCALE_STOP_FILE.refused" ] && [ "$LAUNCHER$rc" != none2 ] || fail "not restarted: $(reason)"
    [ "$rc" != 0 ] || [ -n "$stopping" ] || exit 0
    read -r state preempted < <(squeue --noheader --jobs="$job" --Format=State,PreemptTime) || state=unknown
    # Slurm is ending the job, and its TERM may reach this script last: no crash, and a cancelled job must not run again.
    [ "$state" = RUNNING ] || { say "left to Slurm: job $job is $state" && exit "$((rc ? rc : 1))"; }
    [ "$rc" = 0 ] || crashed "$rc" || exit "$rc"
    [ "$rc" != 0 ] && [ "$count" = 1 ] && [ -z "$stopping" ] || break
    say "start again on the same nodes"
  done
  case $preempted in N/A | '') ;; *) say "preempted: Slurm requeues" && exit 0 ;; esac
  requeue "$job" "$@"
}

# Prints the error of this start and the file that has it, of the node with the clearest one. The launcher's own lines,
# which follow it, name no cause. A file also has the errors of earlier starts; each start begins with a line of dashes.
reason() {
  local file
  for file in "$RUN/slurm/$SLURM_JOB_ID-"*.log; do
    file=$file awk -v start="--- job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0} on " '
      function note(rank) { if (!(rank in words)) words[rank] = $0 }
      /^--- job / { now = index($0, start) == 1; traced = 0; split("", words); next }
      !now { next }
      /^flipscale: error: / { note($3 ~ /^SIG/ ? 5 : 1); next }
      /^Traceback / { traced = 1; next }
      traced && /^[^ ]/ { traced = 0; if (!/^torch\.distributed\.elastic\./) words[2] = $0; next }
      /^[^ ]+: (line [0-9]+: |No module named |[Ee]rror|can.t open )/ { note(3) }
      /^Fatal Python error: |\(exitcode: -?[0-9]+\)/ { note(4) }
      END {
        for (rank = 1; rank <= 5; rank++) if (rank in words) break
        print rank, (rank in words ? words[rank] "; all output: " : "see the end of ") ENVIRON["file"]
      }' < "$file"
  done | sort -s -n | sed -n '1s/^[0-9] //p'
}

# Counts a crash with exit code $1 of this submission since the newest checkpoint in `count`. Fails above MAX_CRASHES.
crashed() {
  local newest place
  newest=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
  newest=${newest:-start}
  place="$newest of $FLIPSCALE_FIRST_JOB"
  echo "$place job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} exit $1 $(date '+%F %T')" >> "$RUN/slurm/crashes"
  count=$(grep -c "^$place " "$RUN/slurm/crashes")
  say "crash $count since $newest (exit code $1); at most $MAX_CRASHES are restarted: $(reason)"
  [ "$count" -le "$MAX_CRASHES" ]
}

# Requeues job $1 as REQUEUE says, with the flags that follow, and ends this script.
requeue() {
  local job=$1
  shift
  case $REQUEUE in
    scontrol)
      say "requeue"
      scontrol requeue "$job"
      sleep 600 & wait ;; # the requeue ends this script
    sbatch)
      local limit options
      limit=$(squeue --noheader --jobs="$job" --format=%l)
      options=(--job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_JOB_NUM_NODES"
        ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$per_node"} --cpus-per-task="$cores" --time="$limit"
        ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"}
        ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"})
      say "submitted again: $(sbatch --parsable --export=ALL "${options[@]}" "$0" "$@")" ;;
    no) say "not done: submit it again to resume" && exit 75 ;;
  esac
}
