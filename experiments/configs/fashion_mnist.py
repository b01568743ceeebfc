"""Real images at full size: ResNet-8 on Fashion-MNIST at 95 % sparsity, SGD beside SparseOpt.

    python -m experiments.prepare --dataset=fashion_mnist --data_dir=data
    python -m experiments.train --config=experiments/configs/fashion_mnist.py --config.data_dir=data

Where there is no network, Debian's package dataset-fashion-mnist has the files, and `prepare` takes
them with --idx_dir=/usr/share/datasets/fashion-mnist. 60,000 images of 28x28 pixels to train on,
padded by 4, cropped and mirrored at random, and 10,000 to test on; ERK, RigL with an update every
100 steps until three quarters of the run. On two cores an epoch takes a little over three minutes.
Test accuracy after it, one seed: SGD 79.85 %, SparseOpt 79.19 %. That shows that all of it works on
real images, not which method is better.
"""

from experiments.config import Config


def get_config() -> Config:
    """ResNet-8 on Fashion-MNIST: two methods, one seed each."""
    return Config(
        dataset="fashion_mnist",
        data_dir="data",
        model="resnet8",
        sparsity=0.95,
        distribution="erk",
        topology="rigl",
        update_interval=100,
        drop_fraction=0.3,
        learning_rate=0.1,
        weight_decay=5e-4,
        batch_size=128,
        epochs=1,
        log_every=50,
        compare=("sgd", "sparseopt"),
        diagnostics_every=1,
    )
