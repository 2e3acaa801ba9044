#!/bin/bash
# Train on the GPUs of a SLURM cluster, from a login node.
#
#   scripts/slurm.sh --nodes=N --gpus=PER_NODE --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
#
#   --nodes=N           nodes
#   --gpus=N            GPUs of each node; one process for each
#   --time=LIMIT        SLURM's form, as 24:00:00; a run that needs longer queues again by itself
#   --grace=SECONDS     before the limit the run is told to save and stop; default 120
#   --cpus=N            CPU cores of each process, for reading data
#   --partition=NAME, --account=NAME, --qos=NAME, --constraint=NAME, --mem=SIZE   as sbatch has them
#   --python=FILE       default .venv/bin/python: pip install -e '.[cuda]' put JAX there
#   --dry-run           print the command, do nothing
#
# DIR is on a file system that all nodes share. The same command again continues the run.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

passed=(partition account qos constraint mem)
parse "nodes gpus time grace cpus python ${passed[*]}" "" "$@"
require nodes gpus
require_run
for name in nodes gpus grace cpus; do
  [[ $(flag "$name" 1) =~ ^[1-9][0-9]*$ ]] ||
    fail "--$name=$(flag "$name"): expected a whole number above 0"
done
python=$(flag python .venv/bin/python)

submit=(sbatch "--nodes=$(flag nodes)" "--gpus-per-node=$(flag gpus)"
  "--ntasks-per-node=$(flag gpus)" "--signal=TERM@$(flag grace 120)")
[[ ! $(flag cpus) ]] || submit+=("--cpus-per-task=$(flag cpus)")
for name in time "${passed[@]}"; do
  [[ ! $(flag "$name") ]] || submit+=("--$name=$(flag "$name")")
done

at_root
[[ $dry_run ]] || command -v "$python" >/dev/null ||
  fail "no $python here: make one, see docs/launch.md, or give --python=FILE"
run "${submit[@]}" scripts/slurm.sbatch "$python" -u "${train[@]}"
