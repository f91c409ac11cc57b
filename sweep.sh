# shellcheck shell=bash
# What run_sweep_ook.sh and run_sweep_ojo.sh have in common. They set DEVICE, BACKENDS (in the order of `both`), DOCKER_GPU
# (flags of docker run) and PARAMETERS (JSON, in place of the same parameters of sweep_config.json), and source this file.
set -euo pipefail

PROGRAM=$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<EOF
usage: ./$PROGRAM [jax|pytorch|both] [options] [-- FLAGS of vit.py]

Creates a Weights & Biases sweep from sweep_config.json and runs its trials on $DEVICE until the sweep ends.
both, the default: one sweep after the other, first ${BACKENDS[0]}, then ${BACKENDS[1]}.

  --count N                  end after N runs of each backend on this machine
  --sweep ENTITY/PROJECT/ID  join a sweep that exists, made for $DEVICE and the backend named: a second machine can help
  --no-docker                run in the current Python environment, not in a container
  --dry-run                  print every command, change nothing
  --help                     this text
  -- FLAGS                   become constants of the sweep: -- --dataset synthetic --num-epochs 1

Settings come from the environment, else from .env: WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT, WANDB_BASE_URL;
DOCKER_BUILD_FLAGS and DOCKER_RUN_FLAGS hold further flags of docker build and docker run. Ctrl-C ends the run, the
agent and the container cleanly.
Exit status: 0 every run finished or was stopped early by the sweep; 1 a run failed, or there was none; 2 wrong
input, or something is missing; 130 Ctrl-C or kill.
EOF
}

say() { echo "$PROGRAM: $*" >&2; }

die() {
  say "error: $*"
  exit 2
}

parse_arguments() {
  backends=() count="" sweep="" docker=true dry_run=false flags=()
  while (($#)); do
    case $1 in
    jax | pytorch | both)
      ((${#backends[@]} == 0)) || die "one of jax, pytorch and both, not several"
      backends=("$1")
      ;;
    --count | --sweep)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --count=* | --sweep=*)
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
  [[ -z $count || $count =~ ^[1-9][0-9]*$ ]] || die "--count must be a positive number, not '$count'"
  [[ -z $sweep || $sweep =~ ^[^/]+/[^/]+/[^/]+$ ]] || die "--sweep must be ENTITY/PROJECT/ID, not '$sweep'"
  [[ ${backends[*]:-both} == both ]] && backends=("${BACKENDS[@]}")
  [[ -z $sweep || ${#backends[@]} == 1 ]] || die "--sweep belongs to one backend: say jax or pytorch"
  [[ -z $sweep || ${#flags[@]} == 0 ]] || die "--sweep joins a sweep as it is: no flags after --"
}

# W&B's settings from .env, as vit.py reads it: what is set in the environment wins, quotes may stand around a value.
read_env_file() {
  [[ -f .env ]] || return 0
  local line name value
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?(WANDB_[A-Z_]+)[[:space:]]*=[[:space:]]*(.*)$ ]] || continue
    name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $value =~ ^\"([^\"]*)\" || $value =~ ^\'([^\']*)\' ]]; then
      value=${BASH_REMATCH[1]}
    else
      value=${value%%[[:space:]]#*}
      value=${value%"${value##*[![:space:]]}"}
    fi
    [[ -v $name ]] || export "$name=$value"
  done <.env
}

# Every missing thing in a line of its own. A dry run says them and goes on.
check_prerequisites() {
  local missing=0 backend
  missing() {
    say "missing: $*"
    missing=1
  }
  [[ -n ${WANDB_API_KEY:-} ]] || missing "WANDB_API_KEY: put it into .env (a copy of .env.example) or the environment"
  [[ -n ${WANDB_ENTITY:-} ]] || missing "WANDB_ENTITY, the W&B user or team: put it into .env or the environment"
  [[ ${WANDB_MODE:-online} == online ]] || missing "W&B online: WANDB_MODE is $WANDB_MODE, and a sweep needs its server"
  [[ -f sweep_config.json ]] || missing "sweep_config.json, the configuration of the sweep"
  if $docker; then
    if ! command -v docker >/dev/null; then
      missing "docker: install it, or use --no-docker"
    elif ! $dry_run && ! docker info >/dev/null 2>&1; then
      missing "the docker daemon: it does not run, or this user may not use it (try: docker info)"
    fi
    for backend in "${backends[@]}"; do
      [[ -f Dockerfile.$DEVICE.$backend ]] || missing "Dockerfile.$DEVICE.$backend"
    done
  elif ! command -v python >/dev/null; then
    missing "python on PATH: activate an environment, or leave out --no-docker"
  elif ! (cd / && python -c 'import wandb; wandb.sweep' 2>/dev/null); then
    missing "wandb in $(command -v python): pip install -c constraints.txt wandb"
  fi
  ((missing == 0)) || $dry_run || exit 2
}

# A command on one line, as it can be pasted into a shell.
show() {
  local word line=+
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line"
}

# Sets in_environment, the words before a Python program: a container of the backend's image, or nothing but the backend.
# The image keeps its caches (data set, compiled steps, W&B) in .cache of the mounted folder, where they outlive the container.
# Values that are secret are passed by name: docker takes them from this process's environment.
set_environment() { # backend, flags of docker run
  local backend=$1 name words
  if ! $docker; then
    in_environment=(env "KERAS_BACKEND=${backend/pytorch/torch}")
    return
  fi
  in_environment=(docker run --rm --init --name "vit-sweep-$DEVICE-$backend" -v "$PWD:/app" "${@:2}")
  for name in WANDB_API_KEY WANDB_ENTITY WANDB_PROJECT WANDB_BASE_URL "${AGENT_SETTINGS[@]%%=*}"; do
    [[ -v $name ]] && in_environment+=(-e "$name")
  done
  read -ra words <<<"${DOCKER_RUN_FLAGS:-}"
  in_environment+=("${words[@]}" "vit:$DEVICE-$backend")
}

# Three quick failures must not end days of work (five runs failed in a row still do), and a run that is told to stop has
# five minutes to save what it has. What the agent prints arrives at once.
AGENT_SETTINGS=(WANDB_AGENT_DISABLE_FLAPPING=true WANDB_AGENT_KILL_DELAY=300 PYTHONUNBUFFERED=1)

run_backend() {
  local backend=$1 path=$sweep ledger seen=0 text words
  local arguments=(--device "$DEVICE" --backend "$backend")
  if $docker; then
    read -ra words <<<"${DOCKER_BUILD_FLAGS:-}"
    local build=(docker build -f "Dockerfile.$DEVICE.$backend" -t "vit:$DEVICE-$backend" "${words[@]}" .)
    show "${build[@]}"
    $dry_run || "${build[@]}" >&2 || return 1
  fi
  if [[ -n $path ]]; then
    arguments=(join "$path" "${arguments[@]}")
  else
    arguments=(create "${arguments[@]}" --parameters "$(printf %s "$PARAMETERS" | tr -s '[:space:]' ' ')" ${flags:+-- "${flags[@]}"})
  fi
  set_environment "$backend"
  show "${in_environment[@]}" python sweep.py "${arguments[@]}"
  if $dry_run; then
    path=${path:-${WANDB_ENTITY:-ENTITY}/${WANDB_PROJECT:-PROJECT}/ID} # not known before the sweep is made
  else
    path=$("${in_environment[@]}" python sweep.py "${arguments[@]}" </dev/null) || return 1
    path=${path##*$'\n'}
  fi

  ledger=results/sweep-${path##*/}.tsv
  set_environment "$backend" "${DOCKER_GPU[@]}" -e "SWEEP_LEDGER=$ledger"
  $docker || in_environment+=("SWEEP_LEDGER=$ledger")
  local agent=("${in_environment[@]}" python -m wandb agent ${count:+--count "$count"} "$path")
  show "${agent[@]}"
  $dry_run && return
  [[ ! -f $ledger ]] || seen=$(wc -l <"$ledger")
  run_agent "${agent[@]}" || failed=true
  text=$(summarise "$path" "$backend" <(tail -n "+$((seen + 1))" "$ledger" 2>/dev/null)) || failed=true
  summary+=("$text")
}

# The agent in a process group of its own: a terminal's Ctrl-C reaches the launcher alone, which then ends it in good order.
run_agent() {
  local status=0
  set -m
  "$@" </dev/null &
  agent=$!
  set +m
  while kill -0 "$agent" 2>/dev/null; do
    wait "$agent" && status=0 || status=$?
  done
  agent=""
  return "$status"
}

# W&B's agent takes a first signal as "no further run", a second one as "tell the run to stop, and wait for it".
stop() {
  interrupted=$((interrupted + 1))
  [[ -n $agent ]] || exit 130
  if ((interrupted > 1)); then
    say "killing the run"
    if $docker; then docker kill "vit-sweep-$DEVICE-$current" >/dev/null; else kill -INT "$agent"; fi || true
    return
  fi
  say "stopping: the run ends after its current step; once more kills it"
  kill -INT "$agent" || true
  sleep 2 || true
  kill -INT "$agent" 2>/dev/null || true
}

# How the runs of one sweep ended, from what `sweep.py trial` noted: the last word on each run counts.
summarise() { # sweep, backend, file of sweep, run, exit status, outcome
  awk -F '\t' -v title="sweep $1 ($2)" '
    !($2 in outcome) { order[++runs] = $2 }
    { outcome[$2] = $4; status[$2] = $3 }
    END {
      for (i = 1; i <= runs; i++) {
        run = order[i]
        if (outcome[run] == "started") { outcome[run] = "failed"; status[run] = "unknown: it was killed" }
        n[outcome[run]]++
        if (outcome[run] == "failed") print "failed: run " run ", exit status " status[run]
      }
      printf "%s: %d finished, %d stopped early, %d failed\n", title, n["finished"], n["stopped"], n["failed"]
      exit n["failed"] > 0 || runs == 0
    }' "$3"
}

main() {
  parse_arguments "$@"
  read_env_file
  check_prerequisites
  local setting
  for setting in "${AGENT_SETTINGS[@]}"; do
    [[ -v ${setting%%=*} ]] || export "${setting?}"
  done

  agent="" current="" interrupted=0 failed=false summary=()
  trap stop INT TERM HUP
  for current in "${backends[@]}"; do
    run_backend "$current" || {
      failed=true
      say "error: no sweep for $current"
    }
    ((interrupted == 0)) || break
  done
  $dry_run && exit 0
  ((${#summary[@]} == 0)) || printf '%s\n' "${summary[@]}"
  ((interrupted == 0)) || exit 130
  ! $failed
}

main "$@"
