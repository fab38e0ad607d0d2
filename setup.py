from setuptools import find_packages, setup

PACKAGES = ["hnn", "ncsn", "stylize", "gan", "lib", "launch"]

setup(
    name="gradient-fields",
    version="0.1.0",
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_dir={"": "."},  # makes an editable install a path, so that a new package needs no new install
    package_data={"lib.features": ["pretrained/*"], "stylize": ["pretrained/*/*", "pretrained/*/*/*"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12",
        "optax>=0.2.6",
        "diffrax>=0.7",
        "optimistix>=0.1",
        "orbax-checkpoint>=0.11.32",
        "tensorflow-datasets>=4.9.9",
        "tyro>=1.0",
        "tqdm>=4.66",
        "pillow>=11",
        "matplotlib>=3.9",
        "numpy>=2.1",
        "scipy>=1.14",
        "scikit-learn>=1.7",
        "scikit-image>=0.25",
        "av>=15",
        "opencv-python-headless>=4.11",
        "safetensors>=0.5",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "app": ["gradio>=6"],
        "bench": ["torch==2.13.0"],
        "convert": ["torch==2.13.0", "h5py>=3.12"],
        "dev": [
            "chex>=0.1.91",
            "pre-commit>=4",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",
        ],
    },
)
