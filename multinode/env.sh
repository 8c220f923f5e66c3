# shellcheck shell=bash disable=SC2034
# What a site sets once; sourced by submit.sh on the login node and by every job. Uncomment and edit.

# ---- options of sbatch for every job (the command line of submit.sh overrides them)
SBATCH_OPTIONS=()
# SBATCH_OPTIONS+=(--partition=gpu --account=my_project --time=24:00:00)
# SBATCH_OPTIONS+=(--gpus-per-node=8 --exclusive --mem=0)
# SBATCH_OPTIONS+=(--signal=B:USR1@600)   # seconds to finish a step and save before the time limit; default: 300

# ---- how many times a job may be restarted (time limits, preemptions, dead nodes) before a person should look
MAX_RESTARTS=${MAX_RESTARTS:-100}

# ---- how many nodes of the allocation may stay idle: nodes that the check below excludes, or that the degrees cannot use
SPARE_NODES=${SPARE_NODES:-0}

# ---- Python: from the PATH of the shell that submits the job, unless set here
# source /shared/envs/torch/bin/activate
# module load cuda/12.8

# ---- processes per node: the GPUs of the allocation. Only if Slurm does not know of GPUs:
# NGPU=8

# ---- the first node's name as all nodes know it: its Slurm name. If that does not resolve, or belongs to a slow network:
# if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
#     MASTER_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib0
# fi

# ---- containers (pyxis and enroot; the repository and the data must be mounted at their own paths)
SRUN_OPTIONS=()
# SRUN_OPTIONS+=(--container-image=/shared/images/torch.sqsh --container-mounts=/shared:/shared --no-container-mount-home)

# ---- NCCL
# export NCCL_DEBUG=WARN
# export NCCL_SOCKET_IFNAME=eth0          # the interface for its bootstrap; GLOO_SOCKET_IFNAME is the same for gloo
# export GLOO_SOCKET_IFNAME=eth0
# InfiniBand
# export NCCL_IB_HCA=mlx5 NCCL_IB_TIMEOUT=22
# AWS EFA (with the aws-ofi-nccl plugin)
# export FI_PROVIDER=efa FI_EFA_USE_HUGE_PAGE=0 NCCL_SOCKET_IFNAME=ens

# ---- a check of the nodes before every start. report: the log names slow and broken nodes; exclude: they also stay idle
# NODE_CHECK=report
# NODE_CHECK_FACTOR=1.5   # how many times the median node's time is slow
