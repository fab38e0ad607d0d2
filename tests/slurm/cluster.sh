#!/bin/sh
# A Slurm cluster of one node on this machine, for tests: cluster.sh start DIR | stop DIR.
#
# Needs slurmctld, slurmd and munged (Debian: apt install slurm-wlm munge) and root. Everything it writes is below DIR;
# commands of Slurm find it by SLURM_CONF=DIR/slurm.conf. The node says that it has four cores, whatever it has.
set -eu
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
host=$(hostname -s)
first_port=${SLURM_TEST_PORT:-36817}

start() {
    mkdir -p "$dir/state" "$dir/spool" "$dir/munge"
    chmod 755 "$dir" "$dir/state" "$dir/spool"
    chmod 711 "$dir/munge"
    head -c 1024 /dev/urandom > "$dir/munge/key"
    chmod 400 "$dir/munge/key"
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --force
    cat > "$dir/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$first_port
SlurmdPort=$((first_port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
KillWait=30
InactiveLimit=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    slurmctld -c -f "$dir/slurm.conf"
    slurmd -c -f "$dir/slurm.conf"
}

stop() {
    for name in slurmd.pid slurmctld.pid munge/pid; do
        [ -f "$dir/$name" ] || continue
        pid=$(cat "$dir/$name")
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2> /dev/null || break
            sleep 0.1
        done
        kill -9 "$pid" 2> /dev/null || true
    done
}

"$action"
