#!/bin/bash
# Train on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   scripts/gke_xpk.sh --cluster=C --workload=W --tpu-type=T --config=FILE --workdir=/DIR
#                      [--config.KEY=VALUE ...]
#
#   --cluster=NAME             made by `xpk cluster create`
#   --workload=NAME            of this start: a-z, 0-9 and -, at most 40 letters
#   --tpu-type=TYPE            of a slice, as v5p-256 (128 chips) or v5litepod-256 (256)
#   --num-slices=N             default 1; the mesh's data axis crosses them
#   --storage=NAME             of `xpk storage attach`, whose mount point holds DIR and the data
#   --docker-image=IMAGE       that has the code and its environment
#   --base-docker-image=IMAGE  otherwise this checkout is added to it, and each host installs
#                              what it needs before it trains; default python:3.12
#   --max-restarts=N           after a lost host or process; default 20
#   --grace=SECONDS            to save in when the run is told to stop; default 300
#   --priority=LEVEL, --project=NAME, --zone=ZONE   as xpk has them
#   --dry-run                  print the command, do nothing
#
# The same --workdir under another --workload continues the run.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

passed=(storage priority project zone)
names="cluster workload tpu-type num-slices docker-image base-docker-image max-restarts grace"
parse "$names ${passed[*]}" "" "$@"
require cluster workload tpu-type
require_run far
workload=$(flag workload)
[[ $workload =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#workload} -le 40 ]] ||
  fail "--workload=$workload: expected a-z, 0-9 and -, from a letter, at most 40 characters"
[[ ! $(flag docker-image) || ! $(flag base-docker-image) ]] ||
  fail "--docker-image and --base-docker-image exclude each other"
for name in num-slices max-restarts grace; do
  [[ $(flag "$name" 1) =~ ^[0-9]+$ ]] || fail "--$name=$(flag "$name"): expected a whole number"
done

submit=(xpk workload create "--cluster=$(flag cluster)" "--workload=$workload"
  "--tpu-type=$(flag tpu-type)" "--num-slices=$(flag num-slices 1)"
  "--max-restarts=$(flag max-restarts 20)"
  # Beside 42 and 127-255, which xpk restarts by itself: 1 is an unforeseen error, 75 a lost peer
  # (moe/hosts/faults.py). After a mistake, 2, the workload ends.
  "--restart-on-exit-codes=1,75"
  "--termination-grace-period-seconds=$(flag grace 300)")
for name in "${passed[@]}"; do
  [[ ! $(flag "$name") ]] || submit+=("--$name=$(flag "$name")")
done

# exec: xpk sends SIGTERM to the shell around its command, and only Python can save.
start="exec python -u $(quote "${train[@]}")"
if [[ $(flag docker-image) ]]; then
  submit+=("--docker-image=$(flag docker-image)")
else
  submit+=("--base-docker-image=$(flag base-docker-image python:3.12)" --script-dir=.)
  start="python -m pip install --quiet '.[tpu]' && $start"
fi
at_root
run "${submit[@]}" "--command=$start"
