#!/usr/bin/env bash
# Start a throw-away SLURM cluster on this machine: one controller, NODES
# virtual nodes (one slurmd each, all on 127.0.0.1) and GPUS fake GPUs per node.
#
#   slurm_up.sh [NODES=2] [GPUS=4] [STATE_DIR=/tmp/slurm-test]
#
# Needs root on Debian; no systemd, no network beyond the package mirror.
# Everything it writes lies under STATE_DIR. Idempotent: run again, it starts
# only the daemons that are not running (so it also revives a killed node).
# After it, `. STATE_DIR/env.sh` points sbatch/squeue/... at this cluster.
# Stop it with slurm_down.sh STATE_DIR.
#
# Environment (all optional):
#   SLURM_TEST_ACCOUNTING  none (default: squeue/scontrol only) or
#                          dbd  (slurmdbd + MariaDB, so that sacct works)
#   SLURM_TEST_PORT        first TCP port (default 27000; NODES + 10 are used)
#   SLURM_TEST_CPUS        CPUs each node claims to have (default 8)
#   SLURM_TEST_MEM         MiB of memory each node claims to have (default 4000)
#   SLURM_TEST_CGROUP      1 or 0: whether to use cgroups (default: if possible)
set -euo pipefail

NODES=${1:-2}
GPUS=${2:-4}
STATE=$(realpath -m "${3:-/tmp/slurm-test}")
ACCOUNTING=${SLURM_TEST_ACCOUNTING:-none}
PORT=${SLURM_TEST_PORT:-27000}
CPUS=${SLURM_TEST_CPUS:-8}
MEM=${SLURM_TEST_MEM:-4000}
HOST=$(hostname -s)
CGROUP=0
if [ -d /sys/fs/cgroup/memory ] && [ -d /sys/fs/cgroup/freezer ] && [ -w /sys/fs/cgroup/memory ]; then CGROUP=1; fi
CGROUP=${SLURM_TEST_CGROUP:-$CGROUP}

ETC=$STATE/etc RUN=$STATE/run LOG=$STATE/log
MUNGE_SOCKET=$RUN/munge.socket
export SLURM_CONF=$ETC/slurm.conf

die() { echo "slurm_up: $*" >&2; exit 1; }

# --- packages ---------------------------------------------------------------
packages="munge slurmctld slurmd slurm-client"
[ "$ACCOUNTING" = dbd ] && packages="$packages slurmdbd mariadb-server"
missing=
for p in $packages; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || missing="$missing $p"
done
if [ -n "$missing" ]; then
  export DEBIAN_FRONTEND=noninteractive
  # No package may start a daemon of its own: answer 101 to invoke-rc.d.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  # Another apt-get may be at work.
  apt="apt-get -qq -o DPkg::Lock::Timeout=300"
  $apt update || die "could not install:$missing (apt-get update failed)"
  # shellcheck disable=SC2086
  $apt install -y --no-install-recommends $missing > /dev/null || die "could not install:$missing"
fi

# --- configuration ----------------------------------------------------------
mkdir -p "$ETC" "$RUN" "$LOG" "$STATE/ctld" "$STATE/dev"
chmod 755 "$STATE" "$ETC" "$RUN" "$LOG"

# A later call with other sizes would leave running daemons with an old config.
want="$NODES $GPUS $ACCOUNTING $PORT $CPUS $MEM $CGROUP"
if [ -e "$STATE/shape" ] && [ "$(cat "$STATE/shape")" != "$want" ]; then
  die "$STATE holds a cluster of another shape ($(cat "$STATE/shape")); slurm_down.sh it first"
fi
echo "$want" > "$STATE/shape"

# Fake GPUs: SLURM asks that each File= is a device and numbers
# CUDA_VISIBLE_DEVICES by its position, so links to /dev/null do.
for i in $(seq 0 $((GPUS - 1))); do ln -sf /dev/null "$STATE/dev/nvidia$i"; done

# Memory limits: with the kernel's memory cgroup (version 1) where there is one,
# so that a job over its limit ends as OUT_OF_MEMORY; else by polling, which
# ends it as FAILED.
if [ "$CGROUP" = 1 ]; then
  tracking="ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup"
  cat > "$ETC/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
AllowedSwapSpace=0
CONF
else
  tracking="ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill,UsePss"
fi

if [ "$ACCOUNTING" = dbd ]; then
  accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$MUNGE_SOCKET
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment"
else
  accounting="AccountingStorageType=accounting_storage/none"
fi

cat > "$ETC/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$MUNGE_SOCKET
CredType=cred/munge
SlurmctldPort=$PORT
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info

$tracking
JobAcctGatherFrequency=task=1
MpiDefault=none
SwitchType=switch/none

# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100

# Short timers, so that failures show within seconds.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_min_age_reserve=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=2
UnkillableStepTimeout=10
CompleteWait=0
MinJobAge=300
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# One line per ended job: an account of what ran when and where that no test has to write itself.
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobs.txt
$accounting

$(for n in $(seq 1 "$NODES"); do
  echo "NodeName=n$n NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 10 + n)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:fake:$GPUS State=UNKNOWN"
done)
PartitionName=gpu    Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=REQUEUE
PartitionName=cpu    Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=REQUEUE
PartitionName=scav   Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=20 PreemptMode=OFF
CONF

last=$((GPUS - 1))
if [ "$GPUS" -gt 0 ]; then
  files="$STATE/dev/nvidia0"; [ "$last" -gt 0 ] && files="$STATE/dev/nvidia[0-$last]"
  printf 'AutoDetect=off\nNodeName=n[1-%s] Name=gpu Type=fake File=%s\n' "$NODES" "$files" > "$ETC/gres.conf"
fi

cat > "$ETC/slurmdbd.conf" <<CONF
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$MUNGE_SOCKET
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
PidFile=$RUN/slurmdbd.pid
LogFile=$LOG/slurmdbd.log
CONF
chmod 600 "$ETC/slurmdbd.conf"

# srun finds this cluster even where a job launcher has dropped SLURM_CONF from
# the environment (the Snakemake SLURM plugin does so before its inner srun).
mkdir -p "$STATE/bin"
printf '#!/bin/sh\nSLURM_CONF=%s exec /usr/bin/srun "$@"\n' "$SLURM_CONF" > "$STATE/bin/srun"
chmod +x "$STATE/bin/srun"

cat > "$STATE/env.sh" <<ENV
export SLURM_CONF=$SLURM_CONF
export PATH=$STATE/bin:\$PATH
ENV

# --- daemons ----------------------------------------------------------------
# alive NAME: is the process whose pid and start time we noted still there?
alive() {
  local pid start
  [ -s "$RUN/$1.proc" ] || return 1
  read -r pid start < "$RUN/$1.proc"
  [ "$(awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$pid/stat" 2>/dev/null)" = "$start" ]
}

# start NAME COMMAND...: run it detached unless alive; note pid and start time.
start() {
  local name=$1; shift
  alive "$name" && return
  setsid "$@" < /dev/null >> "$LOG/$name.out" 2>&1 &
  echo "$! $(awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' /proc/$!/stat)" > "$RUN/$name.proc"
}

# wait_for SECONDS WHAT COMMAND...: poll until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "$what not ready; see $LOG"
    sleep 0.2
  done
}

[ -s "$ETC/munge.key" ] || { head -c 128 /dev/urandom > "$ETC/munge.key"; chmod 600 "$ETC/munge.key"; }
start munged munged --foreground --force --num-threads=4 --socket="$MUNGE_SOCKET" \
  --key-file="$ETC/munge.key" --log-file="$LOG/munged.log" \
  --pid-file="$RUN/munged.pid" --seed-file="$RUN/munged.seed"
wait_for 10 munged munge -n -S "$MUNGE_SOCKET"

if [ "$ACCOUNTING" = dbd ]; then
  if [ ! -d "$STATE/mysql/mysql" ]; then
    mkdir -p "$STATE/mysql"
    mariadb-install-db --no-defaults --user=root --datadir="$STATE/mysql" \
      --auth-root-authentication-method=normal --skip-test-db > "$LOG/mysql-install.log" 2>&1 \
      || die "mariadb-install-db failed; see $LOG/mysql-install.log"
  fi
  start mariadbd mariadbd --no-defaults --user=root --datadir="$STATE/mysql" \
    --socket="$RUN/mysql.sock" --pid-file="$RUN/mysql.pid" \
    --bind-address=127.0.0.1 --port=$((PORT + 2)) \
    --innodb-lock-wait-timeout=900 --innodb-buffer-pool-size=128M
  sql() { mariadb --no-defaults -u root -S "$RUN/mysql.sock" "$@"; }
  wait_for 30 mariadbd sql -e 'select 1'
  sql -e "CREATE DATABASE IF NOT EXISTS slurm_acct;
          CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
          CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY 'slurm';
          GRANT ALL ON slurm_acct.* TO slurm@'127.0.0.1';
          GRANT ALL ON slurm_acct.* TO slurm@localhost;"
  start slurmdbd slurmdbd -D
  wait_for 30 slurmdbd sacctmgr -n list cluster
  sacctmgr -i add cluster test > /dev/null 2>&1 || true
  sacctmgr -i add account test Cluster=test > /dev/null 2>&1 || true
  sacctmgr -i add user root Account=test Cluster=test > /dev/null 2>&1 || true
fi

start slurmctld slurmctld -D
wait_for 30 slurmctld scontrol ping
for n in $(seq 1 "$NODES"); do
  mkdir -p "$STATE/spool/n$n"
  start "slurmd.n$n" slurmd -D -N "n$n"
done

all_idle() {
  [ "$(sinfo -h -N -p gpu -o '%N %t' | grep -cE ' (idle|mix|alloc|comp)$')" -eq "$NODES" ]
}
wait_for 60 nodes all_idle
echo "slurm_up: $NODES node(s) x $GPUS GPU(s); now: . $STATE/env.sh"
