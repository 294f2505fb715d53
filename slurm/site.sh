# shellcheck shell=bash
# What is special about this site. A copy of this file in RUN_DIR is read by the batch scripts, once
# per start of a job, on its first node, before anything of dist_sft runs. A command that fails ends
# nothing: put `|| exit 1` behind what the job cannot do without. Another file is given by:
#
#     launch/slurm.py train RECIPE --nodes 4 --site my_site.sh
#
# Modules, and the Python that has dist_sft installed (by default the one that launched, or python3):
#
#     module load cuda/12.6 || exit 1
#     python=/shared/venvs/dist_sft/bin/python
#
# A container, in which the commands on all nodes run. It needs neither srun nor scontrol, but the
# run folder, the data and the host's network:
#
#     in_job=(apptainer exec --nv --bind /shared /shared/images/dist_sft.sif)
#     python=python3
#
# The network interface between nodes, where libraries choose the wrong one:
#
#     export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#
# A folder on every node's own disk, for a verified copy of the encoded data; the next job uses it,
# too, and nobody removes it:
#
#     export DIST_SFT_SCRATCH=/scratch/$USER/dist_sft
