"""The configuration of a SLURM cluster that runs on one machine and reacts quickly."""

import os
import stat
from pathlib import Path

NETWORK = "10.77.0"  # nowhere but in the namespaces
CTL = f"{NETWORK}.254"
CPUS, MEGABYTES = 4, 4000  # what each node claims to have; all share what there is

SLURM_CONF = """
ClusterName=testcluster
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# For cred_expire seconds, 120 by default, a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/spool/ctl
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log

# No cgroups, and no CPUs of one's own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={megabytes_per_cpu}
JobRequeue=1
ReturnToService=2

# Schedule at once.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,bf_resolution=1,batch_sched_delay=0
PriorityType=priority/basic

# By partition. Without preempt_send_user_signal the preempted job gets TERM for its --signal.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}

# A node that says nothing for SlurmdTimeout seconds is down and its jobs are requeued.
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
KillWait=5
WaitTime=0
MinJobAge=600
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt

{accounting}
{gpu_types}
NodeName=n[1-{nodes}] CPUs={cpus} RealMemory={megabytes}{gpus} State=UNKNOWN
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 GraceTime=10
PartitionName=low PriorityTier=1 GraceTime=10
PartitionName=kill PriorityTier=1 GraceTime=0
PartitionName=cancel PriorityTier=1 GraceTime=10 PreemptMode=CANCEL
PartitionName=high PriorityTier=100 PreemptMode=OFF
"""

# AccountingStoragePass, and not AuthInfo, is where slurmctld finds slurmdbd's munged.
ACCOUNTING_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=ctl
AccountingStoragePass={folder}/munge/socket
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=ctl
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
CommitDelay=1
"""


def addresses(nodes: int) -> dict[str, str]:
    """Return the address of each node by its name."""
    return {f"n{i}": f"{NETWORK}.{i}" for i in range(1, nodes + 1)}


def write(
    folder: Path, nodes: int, accounting: bool, gpus: int, preempt_signal: bool, extra_conf: str
) -> None:
    """Write all files, and make the folders that they name."""
    for name in ("etc", "log", "munge", "run", *(f"spool/{n}" for n in ("ctl", *addresses(nodes)))):
        (folder / name).mkdir(parents=True)
    etc, key = folder / "etc", folder / "munge/key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    hosts = {"localhost": "127.0.0.1", "ctl": CTL, **addresses(nodes)}
    (etc / "hosts").write_text("".join(f"{to} {name}\n" for name, to in hosts.items()))
    conf = SLURM_CONF.format(
        ctl=CTL,
        folder=folder,
        nodes=nodes,
        cpus=CPUS,
        megabytes=MEGABYTES,
        megabytes_per_cpu=MEGABYTES // CPUS,
        preempt_signal="SlurmctldParameters=preempt_send_user_signal" if preempt_signal else "",
        accounting=ACCOUNTING_CONF.format(folder=folder) if accounting else "",
        gpu_types="GresTypes=gpu" if gpus else "",
        gpus=f" Gres=gpu:{gpus}" if gpus else "",
    )
    (etc / "slurm.conf").write_text(f"{conf}\n{extra_conf}\n")
    if accounting:
        (etc / "slurmdbd.conf").touch(0o600)
        (etc / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(folder=folder))
    for number in range(gpus):  # any device will do where no cgroup guards it
        os.mknod(etc / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    if gpus:
        (etc / "gres.conf").write_text(f"Name=gpu File={etc}/gpu[0-{gpus - 1}]\n")
