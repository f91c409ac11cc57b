# shellcheck shell=bash
# What run_sweep_ook.sh and run_sweep_ojo.sh share. Each sets these variables and then sources this file:
#   DEVICE      ook or ojo
#   BACKENDS    jax and pytorch, in the order in which `both` runs them
#   DOCKER_GPU  the flags that give a container the GPU
#   PARAMETERS  JSON that replaces parameters of sweep_config.json
set -euo pipefail

PROGRAM=$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PASSED_TO_CONTAINER=(WANDB_API_KEY WANDB_ENTITY WANDB_PROJECT WANDB_BASE_URL
  WANDB_AGENT_DISABLE_FLAPPING WANDB_AGENT_KILL_DELAY PYTHONUNBUFFERED)

usage() {
  cat <<EOF
usage: ./$PROGRAM [jax|pytorch|both] [options] [-- FLAGS of vit.py]

Creates a Weights & Biases sweep from sweep_config.json and runs its trials on $DEVICE until the sweep ends.
With both, the default, it runs two sweeps: first ${BACKENDS[0]}, then ${BACKENDS[1]}.

  --count N                  stop after N runs of each backend on this machine
  --sweep ENTITY/PROJECT/ID  join a sweep that another machine created for $DEVICE and the same backend
  --no-docker                run in the current Python environment instead of a container
  --dry-run                  print every command and change nothing
  --help                     show this text
  -- FLAGS                   make these flags constants of the sweep: -- --dataset synthetic --num-epochs 1

WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT and WANDB_BASE_URL are read from the environment or, if not set there, from
.env. The environment variables DOCKER_BUILD_FLAGS and DOCKER_RUN_FLAGS add flags to docker build and docker run.
Ctrl-C ends the run, the agent and the container cleanly.

Exit status: 0 if every run finished or was stopped early by the sweep; 1 if a run failed or none was started;
2 if the input is invalid or something is missing; 130 after Ctrl-C or kill.
EOF
}

# A closed terminal, a full disk or a reader that has left must not end the launcher, which has an agent to stop.
log() { echo "$PROGRAM: $*" >&2 || true; }

die() {
  log "error: $*"
  exit 2
}

parse_arguments() {
  backends=() count="" sweep="" docker=true dry_run=false flags=()
  while (($#)); do
    case $1 in
    jax | pytorch | both)
      ((${#backends[@]} == 0)) || die "choose one of jax, pytorch and both"
      backends=("$1")
      ;;
    --count | --sweep)
      (($# > 1)) || die "$1 needs a value"
      if [[ $1 == --count ]]; then count=$2; else sweep=$2; fi
      shift
      ;;
    --count=* | --sweep=*) # parse it again as two arguments
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --no-docker) docker=false ;;
    --dry-run) dry_run=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      flags=("${@:2}")
      break
      ;;
    *) die "unknown argument '$1' (see --help)" ;;
    esac
    shift
  done
  if ((${#backends[@]} == 0)) || [[ ${backends[0]} == both ]]; then
    backends=("${BACKENDS[@]}")
  fi
  [[ -z $count || $count =~ ^[1-9][0-9]*$ ]] || die "--count must be a positive number, not '$count'"
  [[ -z $sweep ]] && return
  [[ $sweep =~ ^[^/]+/[^/]+/[^/]+$ ]] || die "--sweep must be ENTITY/PROJECT/ID, not '$sweep'"
  ((${#backends[@]} == 1)) || die "--sweep needs one backend, jax or pytorch"
  ((${#flags[@]} == 0)) || die "--sweep joins a sweep unchanged and takes no flags after --"
}

# Reads W&B's settings from .env by the rules of vit.py: the environment wins, and values may be quoted.
read_env_file() {
  [[ -f .env ]] || return 0
  local line name value
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line#$'\xef\xbb\xbf'} # a byte-order mark
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?(WANDB_[A-Z_]+)[[:space:]]*=[[:space:]]*(.*)$ ]] || continue
    name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $value =~ ^\"([^\"]*)\" || $value =~ ^\'([^\']*)\' ]]; then
      value=${BASH_REMATCH[1]}
    else # drop a comment and trailing blanks
      value=${value%%[[:space:]]#*}
      value=${value%"${value##*[![:space:]]}"}
    fi
    [[ -v $name ]] || export "$name=$value"
  done <.env
}

# Fills in what neither the environment nor .env sets.
set_agent_defaults() {
  # The agent gives up after three failures in its first minute. They must not end days of work; five failures before a
  # second success still do.
  export WANDB_AGENT_DISABLE_FLAPPING=${WANDB_AGENT_DISABLE_FLAPPING-true}
  # The seconds that a run gets to save its results after it was told to stop.
  export WANDB_AGENT_KILL_DELAY=${WANDB_AGENT_KILL_DELAY-300}
  [[ $WANDB_AGENT_KILL_DELAY =~ ^[0-9]{1,9}$ ]] ||
    die "WANDB_AGENT_KILL_DELAY must be a number of seconds, not '$WANDB_AGENT_KILL_DELAY'"
  # Without this the agent's output arrives late.
  export PYTHONUNBUFFERED=${PYTHONUNBUFFERED-1}
}

# Reports everything that is missing, one line each. A dry run goes on regardless.
check_prerequisites() {
  local missing=() line backend
  [[ -n ${WANDB_API_KEY:-} ]] ||
    missing+=("WANDB_API_KEY: set it in .env (copied from .env.example) or in the environment")
  [[ -n ${WANDB_ENTITY:-} ]] ||
    missing+=("WANDB_ENTITY, your W&B user or team: set it in .env or in the environment")
  [[ ${WANDB_MODE:-online} == online ]] ||
    missing+=("a connection to W&B: a sweep needs its server, but WANDB_MODE is $WANDB_MODE")
  [[ -f sweep_config.json ]] || missing+=("sweep_config.json, the sweep's configuration")
  if $docker; then
    if ! command -v docker >/dev/null; then
      missing+=("docker: install it, or use --no-docker")
    elif ! $dry_run && ! docker info >/dev/null 2>&1; then
      missing+=("the Docker daemon: it is not running, or this user may not use it (try: docker info)")
    fi
    for backend in "${backends[@]}"; do
      [[ -f Dockerfile.$DEVICE.$backend ]] || missing+=("Dockerfile.$DEVICE.$backend")
    done
  elif ! command -v python >/dev/null; then
    missing+=("python on PATH: activate an environment, or leave out --no-docker")
  elif ! (cd / && python -c 'import wandb; wandb.sweep' 2>/dev/null); then # in this folder, ./wandb could pass for it
    missing+=("wandb in $(command -v python): pip install -c constraints.txt wandb")
  fi
  for line in "${missing[@]}"; do
    log "missing: $line"
  done
  ((${#missing[@]} == 0)) || $dry_run || exit 2
}

# Prints a command on one line, ready to be pasted into a shell.
show() {
  local word line=+
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line" || true
}

# Sets `prefix`, the words that run a Python program for a backend: in a container of its image, or on this machine.
# The image keeps its caches (data set, compiled steps, W&B) in .cache of the mounted folder, so they outlive the container.
set_prefix() { # backend, flags of docker run
  local backend=$1 name words
  if ! $docker; then
    prefix=(env "KERAS_BACKEND=${backend/pytorch/torch}")
    return
  fi
  prefix=(docker run --rm --init --name "$container" -v "$PWD:/app" "${@:2}")
  for name in "${PASSED_TO_CONTAINER[@]}"; do
    [[ -v $name ]] && prefix+=(-e "$name") # by name only: the command line must not show the API key
  done
  read -ra words <<<"${DOCKER_RUN_FLAGS:-}"
  prefix+=("${words[@]}" "vit:$DEVICE-$backend")
}

build_image() { # backend
  local words
  read -ra words <<<"${DOCKER_BUILD_FLAGS:-}"
  local command=(docker build -f "Dockerfile.$DEVICE.$1" -t "vit:$DEVICE-$1" "${words[@]}" .)
  show "${command[@]}"
  $dry_run || run "${command[@]}" >&2
}

# Creates the sweep, or joins the one given by --sweep, and sets `path` to ENTITY/PROJECT/ID.
open_sweep() { # backend
  local backend=$1 parameters command
  set_prefix "$backend"
  command=("${prefix[@]}" python sweeps/sweep.py)
  if [[ -n $sweep ]]; then
    command+=(join "$sweep" --device "$DEVICE" --backend "$backend")
  else
    parameters=$(printf %s "$PARAMETERS" | tr -s '[:space:]' ' ')
    command+=(create --device "$DEVICE" --backend "$backend" --parameters "$parameters")
    ((${#flags[@]} == 0)) || command+=(-- "${flags[@]}")
  fi
  show "${command[@]}"
  if $dry_run; then
    path=${sweep:-${WANDB_ENTITY:-ENTITY}/${WANDB_PROJECT:-PROJECT}/ID} # W&B has not assigned an ID yet
    return
  fi
  path=$("${command[@]}" </dev/null) || return 1
  path=${path##*$'\n'} # the last line
}

run_backend() { # backend
  local backend=$1 path ledger lines_before=0 text
  if $docker; then
    { build_image "$backend" && ((interrupts == 0)); } || return 1
  fi
  open_sweep "$backend" || return 1

  ledger=results/sweep-${path##*/}.tsv
  set_prefix "$backend" "${DOCKER_GPU[@]}" -e "SWEEP_LEDGER=$ledger"
  $docker || prefix+=("SWEEP_LEDGER=$ledger")
  local command=("${prefix[@]}" python sweeps/sweep.py agent ${count:+--count "$count"} "$path")
  show "${command[@]}"
  if $dry_run; then
    return
  fi
  [[ ! -f $ledger ]] || lines_before=$(wc -l <"$ledger")
  run_agent "${command[@]}" || failed=true
  text=$(summarise "$path" "$backend" <(tail -n "+$((lines_before + 1))" "$ledger" 2>/dev/null)) || failed=true
  summary+=("$text")
}

# Runs a command in its own process group, so that a terminal's Ctrl-C reaches only the launcher, which then stops the
# command. If the launcher is killed, the command is told to stop.
run() {
  local status=0
  set -m
  setpriv --pdeathsig TERM -- "$@" </dev/null &
  set +m
  while kill -0 "$!" 2>/dev/null; do # a signal interrupts `wait`
    wait "$!" && status=0 || status=$?
  done
  return "$status"
}

run_agent() {
  local status=0
  run "$@" || status=$?
  # A `docker run` that cannot print ends without its container, and `sweep.py agent` there without having been told to.
  ! $docker || run docker stop -t "$((WANDB_AGENT_KILL_DELAY + 10))" "$container" >/dev/null 2>&1 || true
  return "$status"
}

# Stops what runs. It signals first and speaks then: there may be nobody left to hear it.
stop() {
  # `timeout` sends its signal twice.
  ((interrupts == 0 || SECONDS - interrupted_at > 1)) || return 0
  interrupts=$((interrupts + 1)) interrupted_at=$SECONDS
  # Not `jobs -p` in a subshell, which the second signal would end.
  kill -0 "${!-}" 2>/dev/null || exit 130
  if ((interrupts == 1)); then
    signal_job TERM
    log "stopping: the run ends after its current step (press Ctrl-C again to kill it)"
  else
    signal_job USR1
    log "killing the run"
  fi
}

# Sends a signal to `sweep.py agent`, in its container or without one, or to another command that runs.
signal_job() { # signal
  {
    $docker && timeout 30 docker kill --signal "$1" "$container" || kill -s "$1" "$!"
  } >/dev/null 2>&1 || true
}

# Counts how the runs of a sweep ended. `sweep.py trial` writes several lines for a run; the last one counts.
summarise() { # sweep, backend, file with the columns: sweep, run, exit status, outcome
  awk -F '\t' -v title="sweep $1 ($2)" '
    !($2 in outcome) { order[++runs] = $2 }
    { outcome[$2] = $4; status[$2] = $3 }
    END {
      for (i = 1; i <= runs; i++) {
        run = order[i]
        if (outcome[run] == "started") { outcome[run] = "failed"; status[run] = "unknown (killed)" }
        count[outcome[run]]++
        if (outcome[run] == "failed") print "failed: run " run ", exit status " status[run]
      }
      printf "%s: %d finished, %d stopped early, %d failed\n", title, count["finished"], count["stopped"], count["failed"]
      exit count["failed"] > 0 || runs == 0
    }' "$3"
}

main() {
  # No other file may get the number of a stream that is closed.
  [[ -e /proc/self/fd/1 ]] || exec >/dev/null
  [[ -e /proc/self/fd/2 ]] || exec 2>/dev/null
  parse_arguments "$@"
  read_env_file
  set_agent_defaults
  check_prerequisites

  container="" interrupts=0 interrupted_at=0 failed=false summary=()
  trap stop INT TERM
  trap '((interrupts)) || stop' HUP # who closes the terminal after Ctrl-C still wants the results
  trap : PIPE
  for current in "${backends[@]}"; do
    container=vit-sweep-$DEVICE-$current
    run_backend "$current" || {
      failed=true
      ((interrupts)) || log "error: no sweep for $current"
    }
    ((interrupts == 0)) || break
  done
  if $dry_run; then
    exit 0
  fi
  ((${#summary[@]} == 0)) || printf '%s\n' "${summary[@]}" || true
  ((interrupts == 0)) || exit 130
  ! $failed
}

main "$@"
