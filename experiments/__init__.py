"""Everything that runs: training, reports, figures. The library is `sparseopt_jax`."""
