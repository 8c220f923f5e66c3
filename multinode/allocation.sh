# shellcheck shell=bash disable=SC2034
# What a job makes of its allocation; sourced by train.sbatch and evaluate.sbatch, which have fail and say, the
# repository in REPO and in `restarts` how often Slurm has started the job anew. Leaves PYTHON, nodes, hosts, per_node
# (processes a node), gpus (of a node; empty where Slurm knows of none) and port.
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
    fail "NGPU=$NGPU processes a node, but the allocation has $gpus GPUs a node: sbatch --gpus-per-node=$NGPU, or" \
        "leave NGPU out"
fi
per_node=${NGPU:-${gpus:-}}
if [[ -z $per_node ]]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        fail "this node has GPUs, but the allocation has none: sbatch --gpus-per-node=N; or NGPU=N, where Slurm does" \
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
# Another port after every restart, so that no process of the last one can meet this one.
port=$((${MASTER_PORT:-20000 + SLURM_JOB_ID * 16 % 10000} + restarts % 16))
