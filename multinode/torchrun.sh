#!/usr/bin/env bash
# Train a stage on several plain hosts, without Slurm: the same command on each host, except for --node-rank.
#
#   multinode/torchrun.sh --nnodes 2 --node-rank 0 --master-addr host0 [--master-port 29500] [--nproc-per-node 8] \
#       -- --job.config_file my.toml [--x.y z]
#
# The flags are torchrun's, but this project's launcher (torchtitan/extensions/cluster/launch.py) is started: after SIGTERM
# the trainers take as long as their checkpoint needs. Nothing is restarted automatically: repeat the command to resume.
set -euo pipefail
REPO=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
set +u # a site's file may use variables that are not set
source "$REPO/multinode/env.sh"
set -u
source "$REPO/scripts/setup.sh"
usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $*" >&2; exit 1; }

nnodes="" node_rank="" host="" port=29500 per_node=${NGPU:-}
while [[ $# -gt 0 && $1 != -- ]]; do
    flag=${1%%=*}
    case $flag in -h | --help) usage; exit ;; esac
    if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2:-} && shift; fi
    case ${flag//_/-} in
        --nnodes) nnodes=$value ;;
        --node-rank) node_rank=$value ;;
        --master-addr) host=$value ;;
        --master-port) port=$value ;;
        --nproc-per-node) per_node=$value ;;
        *) fail "$flag is not known here; arguments of the trainer come after --" ;;
    esac
    [[ $# -eq 0 ]] || shift
done
if [[ $# -gt 0 ]]; then shift; fi
for name in nnodes node_rank host; do [[ -n ${!name} ]] || { usage >&2; exit 1; }; done
for name in nnodes node_rank port; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "--${name//_/-} ${!name}: it must be a number: the number of hosts is fixed"
done
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
if [[ -z $per_node ]]; then per_node=$((gpus > 0 ? gpus : 1)); fi
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node $per_node: it must be a number"
if [[ $gpus -gt 0 ]]; then setup_allocator; fi
setup_python
settings=$("$PYTHON" -m torchtitan.extensions.cluster.slurm start "$nnodes" "$per_node" "$@") || {
    code=$?
    (( code == 10 )) && { echo "this stage has ended already: nothing to do" >&2; exit 0; }
    exit $code
}
eval "$settings" # DUMP_FOLDER and ARGUMENTS
exec "$PYTHON" -m torchtitan.extensions.cluster.launch --nproc "$per_node" --nnodes "$nnodes" --node-rank "$node_rank" \
    --master "$host:$port" -- "${ARGUMENTS[@]}"
