"""Numbers that papers and their repositories print, for the tables of `python -m launch reproduce`."""

# Greydanus, Dzamba and Yosinski 2019: README of the published code (github.com/greydanus/hamiltonian-nn), seed 0.
# test: mean squared error of the derivative; energy: squared error of the energy along rollouts, by its notebooks.
HNN = {
    "spring": {"baseline": {"test": 3.6656e-2, "energy": 1.7077e-1}, "hnn": {"test": 3.5928e-2, "energy": 3.8416e-4}},
    "pendulum": {"baseline": {"test": 3.5273e-2, "energy": 4.1519e-2}, "hnn": {"test": 3.5586e-2, "energy": 2.4852e-2}},
    "real_pendulum": {
        "baseline": {"test": 2.1864e-3, "energy": 3.8564e-1},
        "hnn": {"test": 5.9584e-3, "energy": 1.4477e-2},
    },
    "two_body": {"baseline": {"test": 2.9575e-5, "energy": 6.3276e-2}, "hnn": {"test": 2.8218e-6, "energy": 3.8751e-5}},
    "three_body": {
        "baseline": {"test": 3.8000e-1, "energy": 1.0906e2},
        "hnn": {"test": 4.8809e-1, "energy": 4.1926e-2},
    },
    "pixel_pendulum": {"baseline": {"energy": 9.2748e-3}, "hnn": {"energy": 1.5315e-4}},
}
