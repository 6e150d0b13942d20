#!/usr/bin/env bash
# Run a training job on TPU VMs: request a slice as a queued resource, install, run, resume, delete.
# Prints every gcloud command before running it; --dry-run only prints. See docs/tpu.md and
# https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu/queued.sh [OPTIONS] COMMAND [-- ARGUMENTS OF launch.train]

commands, in the order of a job's life:
  create   request the slice; it may take minutes or days to arrive
  wait     wait until the slice is ready
  install  copy the committed tree to all hosts and install it
  run      start launch.train on all hosts in the background; it restarts after failures
  logs     follow the log of process 0 (of host 3 with WORKER=3)
  status   show the state of the slice, and of the job on every host
  stop     stop the job after the current step, with a checkpoint
  resume   run; after a preemption, delete, create, wait and install first
  delete   delete the slice, which ends all costs except those of the bucket

options:
  --name=NAME      name of the slice (default: $NAME)
  --slice=SLICE    such as v5p:4x4x8 (default: $SLICE)
  --zone=ZONE      Google Cloud zone (default: $ZONE)
  --project=ID     Google Cloud project (default: $PROJECT, or gcloud's own)
  --spot           use preemptible chips, which are cheaper
  --reserved       use reserved chips
  --dry-run        print the commands, but run none
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

NAME=${NAME:-} SLICE=${SLICE:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} WORKER=${WORKER:-0}
TIER='' DRY_RUN='' COMMAND='' TRAIN=()
# The name of the job in systemd on every host.
UNIT=fam-jax
POLL_SECONDS=${POLL_SECONDS:-30}

while (($#)); do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --slice=*) SLICE=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --spot | --reserved) TIER=$1 ;;
    --dry-run) DRY_RUN=yes ;;
    -h | --help) usage; exit 0 ;;
    --) shift; TRAIN=("$@"); break ;;
    -*) fail "$1: unknown option; --help lists them" ;;
    *) [[ -z $COMMAND ]] || fail "$1: is a second command after $COMMAND; give one at a time"; COMMAND=$1 ;;
  esac
  shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

field() { "$PYTHON" -m launch.tpu.slices "$SLICE" "$1"; }

# Print a command in a form that a shell accepts, and run it.
call() {
  local word
  printf '+'
  for word in "$@"; do
    if [[ $word =~ ^[-a-zA-Z0-9_./:=,@%+]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
  done
  printf '\n'
  [[ -n $DRY_RUN ]] || "$@"
}

where() {
  PLACE=(--zone="$ZONE")
  [[ -z $PROJECT ]] || PLACE+=(--project="$PROJECT")
}

on_hosts() { # WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" --command="$2"
}

# Print the state of the queued resource; nothing if there is none.
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  local request flags=()
  request=$(field request)
  read -ra flags <<<"$request"
  [[ -z $TIER ]] || flags+=("$TIER")
  call gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${PLACE[@]}" "${flags[@]}" \
    --runtime-version="$(field runtime_version)"
}

wait_for() {
  call gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
  [[ -z $DRY_RUN ]] || return 0
  local now before=''
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) fail "the request is $now; check the quota or choose another zone, then delete and create it" ;;
      '') fail "there is no request called $NAME in $ZONE; create it first" ;;
    esac
    [[ $now == "$before" ]] || echo "$(date +%T) $now"
    before=$now
    sleep "$POLL_SECONDS"
  done
  echo "$(date +%T) ACTIVE"
}

# uv brings its own Python, as TPU VMs have 3.10.
install() {
  local archive
  archive=${TMPDIR:-/tmp}/fam_jax.tar.gz
  call git archive --format=tar.gz --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$NAME:fam_jax.tar.gz" "${PLACE[@]}" --worker=all
  on_hosts all "set -e; mkdir -p fam_jax; tar -xzf fam_jax.tar.gz -C fam_jax; cd fam_jax; \
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12; \
~/.local/bin/uv pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
}

# A systemd unit outlives the connection. It restarts when another host died (exit code 3) or this one was told to stop
# (143), but not after a mistake in the command (2). KillMode=mixed sends SIGTERM to the parent alone, which passes it on.
# LimitMEMLOCK is needed because the TPU driver locks the host memory that it transfers to and from.
run() {
  local arguments
  arguments=$(printf ' %q' "${TRAIN[@]}")
  on_hosts all "sudo systemctl reset-failed $UNIT 2>/dev/null; sudo systemd-run --unit=$UNIT --uid=\$USER \
--setenv=HOME=\$HOME --working-directory=\$HOME/fam_jax --property=Restart=on-failure --property=RestartSec=20 \
--property=StartLimitIntervalSec=0 --property=RestartPreventExitStatus=2 --property=TimeoutStopSec=300 \
--property=KillMode=mixed --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
\$HOME/fam_jax/.venv/bin/python -m launch.train$arguments"
}

resume() {
  if [[ -z $DRY_RUN && $(state) == ACTIVE ]]; then
    run
    return
  fi
  if [[ -n $DRY_RUN || -n $(state) ]]; then delete; fi
  create
  wait_for
  install
  run
}

delete() {
  # --force deletes its TPU VMs too. Without --async, the name is free again when this returns.
  call gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

case $COMMAND in
  create | wait | install | run | logs | status | stop | resume | delete) ;;
  '') usage >&2; fail "missing a command; give one of those above" ;;
  *) fail "$COMMAND: unknown command; --help lists them" ;;
esac
[[ -n $NAME ]] || fail "missing --name=NAME; --help lists the options"
[[ -n $ZONE ]] || fail "missing --zone=ZONE; --help lists the options"
where
case $COMMAND in
  run | resume)
    ((${#TRAIN[@]})) || fail "missing the arguments of launch.train; give them behind --"
    [[ " ${TRAIN[*]}" == *" --workdir=gs://"* ]] ||
      fail "missing --workdir=gs://... behind --; all hosts write to it, so it must be in a bucket"
    ;;
esac
case $COMMAND in
  create | resume)
    [[ -n $SLICE ]] || fail "missing --slice=SLICE; give one such as v5p:4x4x8"
    field chips >/dev/null
    ;;
esac
case $COMMAND in
  wait) wait_for ;;
  logs) on_hosts "$WORKER" "sudo journalctl --unit=$UNIT --output=cat --lines=100 --follow" ;;
  status)
    call gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
    on_hosts all "hostname; systemctl is-active $UNIT; sudo journalctl --unit=$UNIT --output=cat --lines=3"
    ;;
  stop) on_hosts all "sudo systemctl stop $UNIT" ;;
  *) "$COMMAND" ;;
esac
