#!/bin/bash
# What scripts/tpu_vm.sh runs on each worker of a TPU VM:
#   worker.sh setup                            ~/permoe.new becomes ~/permoe, with an environment
#   worker.sh run --bucket=[NAME] train.py ARGUMENT...

set -euo pipefail
code=$HOME/permoe environment=$HOME/permoe-venv job=$HOME/permoe-job.sh
export PATH=$HOME/.local/bin:$PATH

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

idle() {
  case $(systemctl is-active permoe || true) in
    active | activating | deactivating) fail "a run is on; first: scripts/tpu_vm.sh stop" ;;
  esac
}

# The TPU VM's own Python is too old for JAX: uv brings one.
setup() {
  idle
  rm -rf "$code"
  mv "$HOME/permoe.new" "$code"
  cd "$code"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x $environment/bin/python ]] || uv venv --quiet --python=3.12 "$environment"
  uv pip install --quiet "--python=$environment/bin/python" --editable '.[tpu]'
  echo "$(hostname): ready"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq gcsfuse
}

# Without a metadata cache, since a worker must see what another has just written; Orbax renames
# the directory of a finished checkpoint.
mount_bucket() {
  local place=/mnt/$1
  ! mountpoint -q "$place" || return 0
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$place"
  sudo chown "$(id -un)" "$place"
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "$1" "$place"
}

# A service, so that it outlives the connection, is started again when it or a peer dies (but not
# after a mistake, 2, or SIGTERM, 143), and is told before the machine goes down. systemd would
# expand $ in arguments, so they are in a file.
start() {
  local bucket=${1#--bucket=}
  shift
  [[ -x $environment/bin/python ]] || fail "no environment here; first: scripts/tpu_vm.sh setup"
  idle
  [[ -z $bucket ]] || mount_bucket "$bucket"
  {
    printf 'cd %q\n' "$code"
    printf 'exec %q -u' "$environment/bin/python"
    printf ' %q' "$@"
    printf '\n'
  } >"$job"
  sudo systemd-run --unit=permoe --collect "--uid=$(id -un)" \
    --property=Restart=on-failure --property=RestartSec=30 \
    --property='RestartPreventExitStatus=2 143' \
    --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10 \
    --property=KillMode=mixed --property=TimeoutStopSec=600 \
    /bin/bash "$job"
}

case ${1:-} in
  setup) setup ;;
  run)
    shift
    start "$@"
    ;;
  *) fail "expected setup or run" ;;
esac
