#!/bin/bash
# Train on a TPU VM, one host or a pod: every worker runs the same command.
#
#   scripts/tpu_vm.sh create --name=N --zone=Z --type=v5p-256 [--spot]   rent it (queued resource)
#   scripts/tpu_vm.sh setup  --name=N --zone=Z [--commit=REVISION]       code and environment
#   scripts/tpu_vm.sh run    --name=N --zone=Z [--bucket=BUCKET] --config=FILE --workdir=/DIR
#                            [--config.KEY=VALUE ...]                    start, or continue
#   scripts/tpu_vm.sh logs   --name=N --zone=Z [--worker=I]              follow what a worker prints
#   scripts/tpu_vm.sh stop   --name=N --zone=Z                           save a checkpoint and stop
#   scripts/tpu_vm.sh delete --name=N --zone=Z                           give it back
#
#   --type=TYPE          as gcloud has it: v5p-256 is v5p:4x4x8 of plan.py (two per chip, as in v4),
#                        v5litepod-256 is v5e:16x16, v6e-256 is v6e:16x16
#   --runtime=VERSION    of the TPU's software; the usual one of the type by default
#   --spot               cheaper, and taken away at any time
#   --commit=REVISION    what to train; default HEAD. Copied from this checkout, never fetched
#   --bucket=BUCKET      mounted at /mnt/BUCKET on every worker, for DIR and --config.data.data_dir
#   --worker=I           default 0, the one that writes the log
#   --project=NAME       default: that of gcloud
#   --dry-run            print the commands, do nothing
#
# The run is a service of each worker: it outlives this connection, starts again when a process
# dies, and gets SIGTERM when the machine is shut down.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

runtime() {
  case $(flag type) in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$(flag type): expected v5p-N, v5litepod-N, v6e-N or v4-N, or give --runtime" ;;
  esac
}

create() {
  local version command
  require type
  version=$(flag runtime)
  [[ $version ]] || version=$(runtime)
  command=(gcloud compute tpus queued-resources create "$(flag name)" "--node-id=$(flag name)"
    "${place[@]}" "--accelerator-type=$(flag type)" "--runtime-version=$version")
  [[ ! $(flag spot) ]] || command+=(--spot)
  run "${command[@]}"
}

# on WORKER COMMAND
on() {
  run gcloud compute tpus tpu-vm ssh "$(flag name)" "${place[@]}" "--worker=$1" "--command=$2"
}

setup() {
  local commit archive name
  commit=$(git -C "$root" rev-parse --quiet --verify --short=12 "$(flag commit HEAD)^{commit}") ||
    fail "--commit=$(flag commit HEAD) is no commit of the git checkout $root"
  [[ $(flag commit) || ! $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
    echo "note: changes that are not committed stay here" >&2
  name=permoe-$commit.tar.gz archive=${TMPDIR:-/tmp}/permoe-$commit.tar.gz
  at_root
  run git archive "--output=$archive" "$commit"
  run gcloud compute tpus tpu-vm scp "$archive" "$(flag name):" "${place[@]}" --worker=all
  on all "mkdir -p permoe.new && tar -xzf $name -C permoe.new &&\
 bash permoe.new/scripts/worker.sh setup"
}

start() {
  local bucket
  require_run far
  bucket=$(flag bucket)
  [[ ! $bucket || $bucket =~ ^[a-z0-9][a-z0-9._-]*$ ]] ||
    fail "--bucket=$bucket: expected the name of a bucket, without gs:// and without a path"
  [[ ! $bucket || $workdir == /mnt/$bucket/?* ]] ||
    fail "--workdir=$workdir is not in the bucket, which is mounted at /mnt/$bucket"
  on all "bash permoe/scripts/worker.sh run $(quote "--bucket=$bucket" "${train[@]}")"
}

action=${1:-}
[[ $action ]] || fail "expected create, setup, run, logs, stop or delete; $0 --help explains them"
shift
case $action in
  create) parse "name zone project type runtime" spot "$@" ;;
  setup) parse "name zone project commit" "" "$@" ;;
  run) parse "name zone project bucket" "" "$@" ;;
  logs) parse "name zone project worker" "" "$@" ;;
  stop | delete) parse "name zone project" "" "$@" ;;
  --help | -h) parse "" "" --help ;;
  *) fail "unknown argument '$action'; expected create, setup, run, logs, stop or delete" ;;
esac
require name zone
place=("--zone=$(flag zone)")
[[ ! $(flag project) ]] || place+=("--project=$(flag project)")
case $action in
  create) create ;;
  setup) setup ;;
  run) start ;;
  logs) on "$(flag worker 0)" "sudo journalctl --unit=permoe --output=cat --lines=100 --follow" ;;
  stop) on all "sudo systemctl stop permoe" ;;
  delete)
    run gcloud compute tpus queued-resources delete "$(flag name)" "${place[@]}" --force --quiet
    ;;
esac
