#!/bin/bash
# Trains one run on all GPUs of a SLURM job: sbatch slurm.sh
# Before the time is up, and when the job is preempted, SLURM sends SIGTERM: every process ends
# after the same step, with a checkpoint. Queued again, the same command goes on from it.
#SBATCH --job-name=scaledreamer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

GPUS=8 # per node
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS HEAD

# one launcher per node, which starts one process per GPU; the run folder is on a shared file system
srun bash -c 'exec accelerate launch --multi_gpu \
    --num_processes $((GPUS * SLURM_NNODES)) --num_machines "$SLURM_NNODES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port 29500 \
    --mixed_precision no --dynamo_backend no \
    -m scaledreamer train --preset paper/cp100k-conv3d --corpus prompts.txt \
    --prior OWNER/NAME --device cuda --prompts-per-step 192 --optim.accumulate 1 --steps 12500 \
    --eval-views 0 --out runs/100k --resume'
