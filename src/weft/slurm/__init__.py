"""Runs on a SLURM cluster: a batch script is written, code and config are kept as they are, and files tell how it went.

    job = weft.submit("run.yaml", slurm={"partition": "gpu", "time": "4:00:00", "gres": "gpu:1"})
    job.result()                 # waits; the FitResult of the run in job.folder

Whatever a cluster does to the job (time limit, preemption, requeue), the run goes on from its last step, bit for bit.
"""
