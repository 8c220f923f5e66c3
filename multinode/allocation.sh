# shellcheck shell=bash disable=SC2034
# A job and its allocation; sourced by train.sbatch and evaluate.sbatch, which define fail, say and REPO (the repository).
# Sets what env.sh sets, restarts (how many times Slurm has restarted the job), PYTHON, nodes, hosts, per_node (processes
# per node), gpus (per node; empty if Slurm knows of none) and port.

# ---- what Slurm says of a job
described="" # on one line
describe() { # JOB: returns 1 if Slurm does not (or no longer) know it, 2 if Slurm does not answer for five minutes
    local i
    for (( i = 0; i < 60; i++ )); do
        described=$(scontrol --oneliner show job "$1" 2>&1) && return 0
        [[ $described != *"Invalid job id"* ]] || return 1
        (( i )) || say "Slurm does not answer (${described%%$'\n'*}): trying again for 5 minutes"
        sleep 5 & wait $!
    done
    return 2
}
said_of_job() { [[ " $described" =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; } # FIELD

describe "$SLURM_JOB_ID" || fail "Slurm does not know this job: $described"
restarts=$(said_of_job Restarts) # not SLURM_RESTART_COUNT, which a job that was submitted from within a job inherits

# ---- the site's settings, and Python
set +u # a site's file may use variables that are not set
# shellcheck source=env.sh
source "$REPO/multinode/env.sh"
set -u
source "$REPO/scripts/setup.sh"
if [[ -n ${PYTHON:-} ]]; then
    setup_has_all "$PYTHON" || fail "PYTHON=$PYTHON lacks what is needed: $(setup_lacks "$PYTHON")"
else
    setup_find || fail "no Python on this PATH has what is needed ($(setup_lacks "$(command -v python3)")):" \
        "activate one before sbatch, or in multinode/env.sh"
fi
export PYTHON PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# ---- what was allocated
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-}
if [[ -n ${NGPU:-} && -n $gpus && $NGPU != "$gpus" ]]; then
    fail "NGPU=$NGPU processes per node, but the allocation has $gpus GPUs per node: sbatch --gpus-per-node=$NGPU, or" \
        "leave NGPU out"
fi
per_node=${NGPU:-${gpus:-}}
if [[ -z $per_node ]]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        fail "this node has GPUs, but the allocation has none: sbatch --gpus-per-node=N; or NGPU=N, if Slurm does" \
            "not know of GPUs"
    fi
    per_node=1
fi
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "NGPU=$per_node is not a number of processes"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=${SLURM_CPUS_ON_NODE:-1}
    export OMP_NUM_THREADS=$((cores > per_node ? cores / per_node : 1))
fi
if (( ${SLURM_CPUS_ON_NODE:-$per_node} < per_node )); then
    say "warning: $per_node processes share $SLURM_CPUS_ON_NODE CPUs of a node: sbatch --exclusive, or --cpus-per-task=N"
fi
if [[ -n $gpus ]] || command -v nvidia-smi >/dev/null; then setup_allocator; fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Another port after every restart, so that no process of the previous start can join.
port=$((${MASTER_PORT:-20000 + SLURM_JOB_ID * 16 % 10000} + restarts % 16))
