"""The main job: ResNet-20 on the 8x8 digits at 95 % sparsity; dense, SGD and SparseOpt, 3 seeds.

    python -m experiments.demo

ERK, RigL with 10 topology updates (every 8 steps until three quarters of the run), 110 steps a
run. It took 44 s on two idle cores.
Test accuracy after the last epoch on 355 images, mean and standard deviation over the seeds 0, 1
and 2, on a CPU:

    dense      97.93 ± 0.43 %
    SGD        97.93 ± 0.16 %
    SparseOpt  97.84 ± 0.43 %

One test image is 0.28 %: the digits are too easy, and three seeds too few, to tell the methods
apart. They show that all of it works, not which method is better.
"""

from experiments.config import Config


def get_config() -> Config:
    """ResNet-20 on digits: three methods, three seeds each."""
    return Config(
        dataset="digits",
        model="resnet20",
        sparsity=0.95,
        distribution="erk",
        topology="rigl",
        update_interval=8,
        drop_fraction=0.3,
        update_end=0.75,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        batch_size=64,
        epochs=5,
        seed=0,
        seeds=3,
        compare=("dense", "sgd", "sparseopt"),
        log_every=11,  # steps: half an epoch
        diagnostics_every=0,  # a gradient that is compiled and taken; the demo takes one of its own
        keep_best=False,  # a checkpoint takes a second, as much as six steps; there is one a run
    )
