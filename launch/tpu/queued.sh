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
  run      start launch.train on all hosts in the background; it restarts after failures and reboots
  logs     follow the log of process 0 (of host 3 with WORKER=3)
  status   show the state of the slice, and of the job on every host
  stop     stop the job after the current step, with a checkpoint
  resume   run; if the slice is not ready, first wait for it and install; after a preemption, request it again
  delete   delete the slice, which ends all costs except those of the bucket

options:
  --name=NAME      name of the slice (default: $NAME)
  --slice=SLICE    such as v5p:4x4x8 or v5p-256 (default: $SLICE)
  --zone=ZONE      Google Cloud zone (default: $ZONE)
  --project=ID     Google Cloud project (default: $PROJECT, or gcloud's own)
  --spot           use preemptible chips, which are cheaper
  --reserved       use reserved chips
  --env=NAME=VALUE environment variable of the job; may be repeated
  --dry-run        print the commands, but run none

options of the VMs and of the way to them:
  --network=NAME, --subnetwork=NAME
                   network of the VMs (default: the project's default network)
  --internal-ips   give the VMs no external addresses
  --service-account=EMAIL
                   what the VMs run as (default: the project's default service account)
  --tunnel-through-iap
                   connect to the VMs through Identity-Aware Proxy
  --create-flag=FLAG
                   any other flag of gcloud compute tpus queued-resources create; may be repeated
  --connect-flag=FLAG
                   any other flag of gcloud compute tpus tpu-vm ssh and scp; may be repeated
TEXT
}

fail() {
  local message="$*"
  echo "error: ${message//$'\n'/ }" >&2
  exit 2
}

NAME=${NAME:-} SLICE=${SLICE:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} WORKER=${WORKER:-0}
TIER='' DRY_RUN='' COMMAND='' TRAIN=() ENV=() CREATE=() CONNECT=()
# The name of the job in systemd on every host.
UNIT=fam-jax
UNIT_FILE=/etc/systemd/system/$UNIT.service
POLL_SECONDS=${POLL_SECONDS:-30}

while (($#)); do
  case $1 in
    # OPTION VALUE is OPTION=VALUE.
    --name | --slice | --zone | --project | --env | --network | --subnetwork | --service-account | --create-flag | --connect-flag)
      (($# > 1)) || fail "$1: has no value; write $1=VALUE"
      set -- "$1=$2" "${@:3}"
      ;;
  esac
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --slice=*) SLICE=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --spot | --reserved)
      [[ -z $TIER || $TIER == "$1" ]] || fail "--spot, --reserved: chips are either preemptible or reserved; give one of them"
      TIER=$1
      ;;
    --env=*)
      [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1: expected --env=NAME=VALUE"
      ENV+=("${1#*=}")
      ;;
    --network= | --subnetwork= | --service-account= | --create-flag= | --connect-flag=) fail "${1%=}: has no value; write ${1}VALUE" ;;
    --internal-ips | --network=* | --subnetwork=* | --service-account=*) CREATE+=("$1") ;;
    --create-flag=*) CREATE+=("${1#*=}") ;;
    --tunnel-through-iap) CONNECT+=("$1") ;;
    --connect-flag=*) CONNECT+=("${1#*=}") ;;
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

# Print a command in a form that a shell accepts.
show() {
  local word
  printf '+'
  for word in "$@"; do
    if [[ $word =~ ^[-a-zA-Z0-9_./:=,@%+]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
  done
  printf '\n'
}

# Print a command, and run it.
call() {
  show "$@"
  [[ -n $DRY_RUN ]] || "$@"
}

# Print the --workdir that the arguments of launch.train end up with.
workdir() {
  local found='' before='' argument
  for argument in "${TRAIN[@]}"; do
    if [[ $before == --workdir ]]; then found=$argument; fi
    if [[ $argument == --workdir=* ]]; then found=${argument#*=}; fi
    before=$argument
  done
  printf %s "$found"
}

where() {
  PLACE=(--zone="$ZONE")
  [[ -z $PROJECT ]] || PLACE+=(--project="$PROJECT")
}

on_hosts() { # WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" "${CONNECT[@]}" --worker="$1" --command="$2"
}

# Print the state of the queued resource: nothing if there is none, UNKNOWN if gcloud fails for another reason.
state() {
  local errors
  errors=$(mktemp)
  gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)' 2>"$errors" ||
    if ! grep -qi 'not.found' "$errors"; then
      cat "$errors" >&2
      echo UNKNOWN
    fi
  rm -f "$errors"
}

create() {
  local request flags=()
  request=$(field request)
  read -ra flags <<<"$request"
  [[ -z $TIER ]] || flags+=("$TIER")
  call gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${PLACE[@]}" "${flags[@]}" \
    --runtime-version="$(field runtime_version)" "${CREATE[@]}"
}

wait_for() {
  show gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
  [[ -z $DRY_RUN ]] || return 0
  local now before=''
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "the request is $now; check the quota or choose another zone, then delete and create it" ;;
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
  call gcloud compute tpus tpu-vm scp "$archive" "$NAME:fam_jax.tar.gz" "${PLACE[@]}" "${CONNECT[@]}" --worker=all
  on_hosts all "set -e; mkdir -p fam_jax; tar -xzf fam_jax.tar.gz -C fam_jax; cd fam_jax; \
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12; \
~/.local/bin/uv pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
}

# Print the script that the unit runs on every host.
job() {
  local variable
  for variable in "${ENV[@]}"; do printf 'export %s=%q\n' "${variable%%=*}" "${variable#*=}"; done
  printf 'cd fam_jax\nexec .venv/bin/python -m launch.train'
  printf ' %q' "${TRAIN[@]}"
}

# Only the user may read the script, because its environment may hold a secret.
run() {
  on_hosts all "set -e; refuse() { echo \"error: \$(hostname): \$1\" >&2; exit 2; }; \
[ -e fam_jax/launch/tpu/$UNIT.service ] || refuse 'fam_jax is not installed; run install first'; \
case \$(systemctl is-active $UNIT || true) in active | activating | deactivating) \
refuse 'the job runs already; stop it first' ;; esac; \
(umask 077; printf '%s\n' $(printf %q "$(job)") >$UNIT.sh); \
sed s/@USER@/\$(id -un)/ fam_jax/launch/tpu/$UNIT.service | sudo tee $UNIT_FILE >/dev/null; \
sudo systemctl daemon-reload; sudo systemctl reset-failed $UNIT 2>/dev/null || true; \
sudo systemctl enable --quiet $UNIT; sudo systemctl start $UNIT"
}

stop() {
  on_hosts all "set -e; if systemctl cat $UNIT >/dev/null 2>&1; then sudo systemctl stop $UNIT; \
sudo systemctl disable --quiet $UNIT || true; sudo rm -f $UNIT_FILE; rm -f $UNIT.sh; sudo systemctl daemon-reload; \
else echo \"\$(hostname): there is no job\"; fi"
}

# A request that waits in the queue keeps its place.
resume() {
  local now=''
  [[ -n $DRY_RUN ]] || now=$(state)
  while [[ $now == SUSPENDING || $now == DELETING ]]; do
    sleep "$POLL_SECONDS"
    now=$(state)
  done
  case $now in
    ACTIVE) run; return ;;
    UNKNOWN) fail "gcloud does not report the state of $NAME, for the reason above; try again" ;;
    FAILED | SUSPENDED) delete; create ;;
    '') [[ -z $DRY_RUN ]] || delete; create ;;
  esac
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
[[ $(LC_ALL=C; [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] && echo right) ]] ||
  fail "--name=$NAME: Google Cloud does not accept it; use up to 63 lower-case letters, digits and dashes, with a letter at the beginning and no dash at the end"
[[ -n $ZONE ]] || fail "missing --zone=ZONE; --help lists the options"
where
case $COMMAND in
  run | resume)
    ((${#TRAIN[@]})) || fail "missing the arguments of launch.train; give them behind --"
    [[ $(workdir) == gs://* ]] ||
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
  *) "$COMMAND" ;;
esac
