#!/usr/bin/env bash
# A training job on TPU VMs: asks for a slice by a queued resource, installs, runs, resumes, deletes.
# Every gcloud command is printed before it runs; --dry-run only prints. See docs/tpu.md, and
# https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu/queued.sh [OPTIONS] COMMAND [-- ARGUMENTS OF launch.train]

commands, in the order of a job's life:
  create   ask for the slice; it may take minutes or days to come
  wait     until it is there
  install  copy the committed tree to all hosts and install it
  run      start launch.train on all hosts, in the background; started again after failures
  logs     follow process 0 (WORKER=3: another host)
  status   of the slice, and of the job on every host
  stop     the job, at the end of a step, with a checkpoint
  resume   run; after a preemption delete, create, wait and install first
  delete   the slice, and with it all costs but the bucket's

options:
  --name=NAME      of the slice (or $NAME)
  --slice=SLICE    such as v5p:4x4x8 (or $SLICE)
  --zone=ZONE      (or $ZONE)
  --project=ID     default: gcloud's own
  --spot           preemptible, and cheaper; or --reserved
  --dry-run        print the commands only
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

NAME=${NAME:-} SLICE=${SLICE:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} WORKER=${WORKER:-0}
TIER='' DRY_RUN='' COMMAND='' TRAIN=()
UNIT=fam-jax  # systemd's name of the job on every host
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
    -*) fail "unknown option $1; --help lists them" ;;
    *) [[ -z $COMMAND ]] || fail "one command at a time, not both $COMMAND and $1"; COMMAND=$1 ;;
  esac
  shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

field() { "$PYTHON" -m launch.tpu.slices "$SLICE" "$1"; }

# Prints a command as it could be typed, and runs it.
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

state() { # of the queued resource; empty if there is none
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
      FAILED | SUSPENDED | SUSPENDING) fail "the request is $now: 'delete' it, then 'create' (a quota? another zone?)" ;;
      '') fail "there is no request called $NAME in $ZONE: 'create' it first" ;;
    esac
    [[ $now == "$before" ]] || echo "$(date +%T) $now"
    before=$now
    sleep "$POLL_SECONDS"
  done
  echo "$(date +%T) ACTIVE"
}

# TPU VMs have Python 3.10: uv brings its own.
install() {
  local archive
  archive=${TMPDIR:-/tmp}/fam_jax.tar.gz
  call git archive --format=tar.gz --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$NAME:fam_jax.tar.gz" "${PLACE[@]}" --worker=all
  on_hosts all "set -e; mkdir -p fam_jax; tar -xzf fam_jax.tar.gz -C fam_jax; cd fam_jax; \
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12; \
~/.local/bin/uv pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
}

# A unit of systemd outlives the connection, starts again when another host has died (exit code 3) or this one was
# told to stop (143), and not after a mistake in the command (2). KillMode: SIGTERM to the parent alone, which passes it
# on. LimitMEMLOCK: the TPU's driver locks the host memory that it transfers to and from.
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
  # --force: with its TPU VMs. Without --async the name is free again when this returns.
  call gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

case $COMMAND in
  create | wait | install | run | logs | status | stop | resume | delete) ;;
  '') usage >&2; fail "no command" ;;
  *) fail "unknown command $COMMAND; --help lists them" ;;
esac
[[ -n $NAME ]] || fail "--name=NAME is missing"
[[ -n $ZONE ]] || fail "--zone=ZONE is missing"
where
case $COMMAND in
  run | resume)
    ((${#TRAIN[@]})) || fail "give the arguments of launch.train behind --"
    [[ " ${TRAIN[*]}" == *" --workdir=gs://"* ]] ||
      fail "--workdir=gs://... is missing: all hosts write to it, so it must be in a bucket"
    ;;
esac
case $COMMAND in
  create | resume)
    [[ -n $SLICE ]] || fail "--slice=SLICE is missing, such as v5p:4x4x8"
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
